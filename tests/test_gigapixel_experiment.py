"""`ats train gigapixel-mnist`, and nested attention as any experiment's option."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import ats
from ats.datasets.manifest import read_manifest
from ats.experiments.build import build_model, make_view
from ats.experiments.commands.command_line import run
from ats.experiments.config import ExperimentConfig, ModelConfig
from ats.experiments.gigapixel_mnist import GIGAPIXEL_MNIST, GigapixelMNISTConfig, GigapixelMNISTData
from ats.experiments.level_options import LevelOptions, read_levels
from ats.experiments.registry import experiment_data
from ats.experiments.training import train
from ats.models import NestedClassifier
from bench.gigapixel_mnist import rows_of, runs, table
from tests.helpers import assert_close, seeded
from tests.test_training import StopAt, assert_same, weights

DATA = GigapixelMNISTConfig(
    digits="bundled",
    image_size=1024,
    place_size=128,
    place_noise=2,
    n_noise=20,
    train_images=4,
    clear_epochs=1,
    rising_epochs=1,
    validation_images=2,
    test_images=3,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    demo = GIGAPIXEL_MNIST.presets["demo"]
    return dataclasses.replace(
        demo,
        data=DATA,
        model=dataclasses.replace(demo.model, levels=("128:3:2", "8:2:4")),
        optim=dataclasses.replace(demo.optim, epochs=3, batch_size=2, draws=2),
        trainer=dataclasses.replace(demo.trainer, accelerator="cpu", checkpoint_seconds=0.0),
        output=tmp_path_factory.mktemp("gigapixel") / "run",
    )


@pytest.fixture(scope="module")
def trained(tiny: ExperimentConfig) -> Path:
    return train(tiny)


def test_stopped_and_resumed_it_ends_with_the_same_weights(tiny, trained, tmp_path, capsys):
    stopped = dataclasses.replace(tiny, output=tmp_path / "stopped")
    with pytest.raises(Exception, match="begins anew: it had no checkpoint yet"):
        train(stopped, callbacks=(StopAt(step=1),))
    with pytest.raises(Exception, match="goes on from its last checkpoint"):
        train(stopped, callbacks=(StopAt(step=3),))
    assert (ats.load(stopped.output).unfinished, ats.load(tiny.output).unfinished) == ("epoch 1 of 3", "")
    capsys.readouterr()
    assert run(f"evaluate {stopped.output} --images 1".split()) == 0
    assert "not trained to its end: epoch 1 of 3" in " ".join(capsys.readouterr().err.split())
    assert_same(weights(train(stopped)), weights(trained))
    assert "4 images to train on, 3 to test on; 3 epochs, going on after 1" in " ".join(capsys.readouterr().out.split())


def test_it_is_evaluated_and_predicts_as_any_run(tiny, trained, tmp_path, capsys):
    assert run(f"evaluate {tiny.output} --repeats 2 --output {tmp_path / 'found.json'}".split()) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert (found["images"], found["n_patches"], found["repeats"]) == (3, 6, 2)
    assert "Data: Gigapixel MNIST of the bundled digits" in " ".join(capsys.readouterr().out.split())
    more = f"evaluate {tiny.output} --images 2 --n-patches 3x2 --n-patches 2X4 --output {tmp_path / 'more.json'}"
    assert run(more.split()) == 0
    assert [row["n_patches"] for row in json.loads((tmp_path / "more.json").read_text())] == [6, 8]
    assert run(f"evaluate {tiny.output} --n-patches 6".split()) == 1
    assert "one number a level, of which there are 2" in " ".join(capsys.readouterr().err.split())
    assert run(f"evaluate {tiny.output} --method anytime --budget 8 --lead 2 --images 2".split()) == 0
    model = ats.load(tiny.output)
    image, _ = experiment_data(tiny).split("test")[0]
    prediction = model.predict(image, generator=seeded(0))
    assert prediction.logits.shape == (1, 10)
    assert bool((prediction.standard_error > 0).all())
    assert len(prediction.table()) == 6


def test_an_ordered_run_predicts_with_the_mean_over_orders(tiny):
    config = dataclasses.replace(
        tiny, model=dataclasses.replace(tiny.model, estimator="ordered", control_variate=False)
    )
    model = build_model(config).eval()
    from ats.experiments.trained import TrainedModel

    image, _ = experiment_data(config).split("test")[0]
    assert TrainedModel(config, model, tuple("0123456789")).predict(image).estimator == "unordered"


def test_an_oracle_looks_at_places_with_digits_alone(tiny):
    for levels in (("128:3:2", "8:2:4"), ()):
        model = dataclasses.replace(tiny.model, levels=levels, n_patches=4, method="uniform")
        config = dataclasses.replace(tiny, data=dataclasses.replace(DATA, oracle=True), model=model, output=None)
        assert "-oracle-uniform-" in str(config.run_folder)
        data = experiment_data(config)
        assert isinstance(data, GigapixelMNISTData)
        indices = torch.arange(4)
        view, image, _ = data.load("train", indices, epoch=2)
        mask = data.masks("train", indices, epoch=2)
        _, sample = build_model(config)(view, image, mask=mask, generator=seeded(1))
        for number in range(4):
            places = torch.from_numpy(data.trained_on(2).scene(number).places[:5])
            boxes, size = (sample.offsets[number] if levels else sample[number].offsets[0]), torch.tensor(50)
            side = 32 if levels else 128  # of what the mask tells apart
            centres = boxes[:, None] + size / 2
            inside = (centres > places - side) & (centres < places + DATA.place_size + side)
            assert bool(inside.all(-1).any(-1).all())
    assert experiment_data(tiny).masks("train", indices) is None


def test_noise_rises_and_each_epoch_has_images_of_its_own(tiny):
    data = experiment_data(tiny)
    assert isinstance(data, GigapixelMNISTData)
    glyphs = [len(data.trained_on(epoch).scene(0).glyph_ids) for epoch in range(4)]
    assert glyphs == [5, 5 + 24 + 10, 5 + 48 + 20, 5 + 48 + 20]
    assert len({tuple(data.trained_on(epoch).labels.tolist()) for epoch in range(8)}) > 4
    assert len(data.labels("validation")) == 2


def test_several_draws_of_a_step_are_draws_of_the_same_images(tiny):
    model = build_model(tiny).eval()
    assert isinstance(model, NestedClassifier)
    view, image, _ = experiment_data(tiny).load("test", torch.arange(3))
    logits, sample = model(view, image, generator=seeded(2), draws=3)
    first, _ = model(view, image, generator=seeded(2))
    assert logits.shape == (9, 10)
    assert torch.equal(logits[:3], first)
    assert not torch.equal(logits[3:6], first)
    assert sample.n == (3, 2)


def test_a_view_of_an_image_of_any_size_has_whole_cells(tiny):
    image = torch.rand(1, 1, 700, 1000, generator=seeded(3))
    view = make_view(tiny, image)
    assert view.shape == (1, 1, 6, 8)  # ⌈700 / 128⌉ and ⌈1000 / 128⌉, which are whole cells of 2
    _, sample = build_model(tiny).eval()(view, image, generator=seeded(4))
    assert bool((sample.offsets >= -25).all())
    assert bool((sample.offsets[..., 0] <= 700).all())


def test_levels_are_read_and_named(tiny):
    assert read_levels(["128:10", "8:2:4:6"]) == (LevelOptions(128, 10), LevelOptions(8, 2, 4, 6))
    assert ModelConfig(levels=("128:10", "8:2")).label == "ats-10x2"
    assert ModelConfig(levels=("128:10", "8:2"), method="mil").nested == ()
    assert "gigapixel-mnist-demo-ats-20-" in str(
        dataclasses.replace(tiny, output=None, model=dataclasses.replace(tiny.model, levels=())).run_folder
    )


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (("128",), "model.levels has '128', expected SCALE:DRAWS"),
        (("128:x",), "expected SCALE:DRAWS"),
        (("128:0",), "at least 1"),
        (("128:2", "100:2"), "falling scales, each a multiple of the next, got 128:2 100:2"),
        (("128:2:4:1", "8:2"), "has no context: leave it out of '128:2:4:1'"),
    ],
    ids=["one number", "no number", "none", "scales", "context"],
)
def test_levels_that_cannot_be(levels, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(levels=levels)


def test_what_the_options_refuse(tiny):
    with pytest.raises(ValueError, match="reads whole images, which are too large here; choose ats or uniform"):
        dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, method="mil"))
    with pytest.raises(ValueError, match=r"leave none of optim\.epochs=2 for images with all of the noise"):
        dataclasses.replace(tiny, optim=dataclasses.replace(tiny.optim, epochs=2))
    from ats.experiments.megapixel_mnist import PRESETS

    flat = PRESETS["demo"]
    with pytest.raises(ValueError, match=r"have none for model\.levels; leave the option out"):
        build_model(dataclasses.replace(flat, model=dataclasses.replace(flat.model, levels=("4:2",))))


def test_from_disk_the_same_is_drawn_and_seen(tmp_path, capsys):
    """What one command writes are the demo's own images: views, draws, patches and features are those from memory."""
    pytest.importorskip("tifffile")
    pytest.importorskip("rasterio")
    folder = tmp_path / "files"
    assert run(f"synthesise gigapixel-mnist {folder} --images 2 --image-size 2048 --seed 3".split()) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "labels.csv, test: " in said
    assert "ats train images --data.manifest" in said
    demo = GIGAPIXEL_MNIST.presets["demo"]
    config = dataclasses.replace(demo, seed=3, data=dataclasses.replace(demo.data, image_size=2048, test_images=1))
    model, data = build_model(config).eval(), experiment_data(config)
    view, images, label = data.load("test", torch.arange(1))
    written = ats.open_image(folder / "test-0000.tif")
    assert [level.height for level in written.levels] == [level.height for level in images[0].levels]
    assert read_manifest(folder / "labels.csv").select("test")[0].label == str(int(label))
    with torch.no_grad():
        expected = model.sampling(view, images, generator=seeded(5))
        for other in (None, make_view(config, [written])):
            pooled, _, sample = model.sampling(other, [written], generator=seeded(5))
            assert torch.equal(sample.offsets, expected[2].offsets)
            assert torch.equal(sample.patches, expected[2].patches)
            assert_close(pooled, expected[0], torch.float32)


def test_bytes_are_the_nearest_to_the_mean(tiny):
    images = experiment_data(tiny).split("test")
    for level in (0, 3):
        box = level, 8, 16, 100, 60
        exact, found = images.image(1).read(*box), images.image(1, dtype=torch.uint8).read(*box)
        assert float((255 * exact - found).abs().max()) <= 0.5 + 1e-4
    assert len({images.image(0).fingerprint, images.image(0, dtype=torch.uint8).fingerprint}) == 2


def test_what_is_compared_draws_as_much_and_may_be_shortened(tmp_path):
    options = argparse.Namespace(
        preset="demo",
        methods=[],
        compare=False,
        sizes=[],
        seeds=2,
        first_seed=1,
        epochs=10,
        test_images=7,
        runs=tmp_path,
    )
    found = runs(options)
    assert [name for name, _ in found[::2]] == ["nested", "flat", "uniform", "oracle"]
    assert len({config.run_folder for _, config in found}) == 8
    for name, config in found:
        model, data = config.model, config.data
        assert isinstance(data, GigapixelMNISTConfig)
        assert math.prod(level.n for level in model.nested) == 20 or (not model.nested and model.n_patches == 20)
        assert (data.clear_epochs, data.rising_epochs, config.optim.epochs, data.test_images) == (2, 2, 10, 7)
        assert data.oracle == (name == "oracle")
    options.compare, options.seeds = True, 1
    flat = [config for name, config in runs(options) if name == "flat at 1/8"]
    assert [config.data.image_size for config in flat] == [2048, 4096, 8192]
    assert isinstance(build_model(flat[0]), NestedClassifier)


def test_the_table_has_means_and_spreads_of_seeds():
    one = {"method": "nested", "image_size": 8192, "test_image_size": 8192, "n_patches": 20}
    one |= {"images_trained_on": 1000, "minutes": 2.0}
    rows = [one | {"error": error, "averaged_error": 0.5 * error} for error in (0.1, 0.2)]
    rows.append(rows[0] | {"test_image_size": 32768})
    assert "| nested | 8,192² | 8,192² | 20 | 2 | 0.150 (0.100 to 0.200) | 0.075 (0.050 to 0.100) | 1,0" in table(rows)
    assert "| nested | 8,192² | 32,768² | 20 | 1 | 0.100 | 0.050 | 1,000 | 2.0 |" in table(rows)


def test_a_run_is_tested_with_other_draws_and_on_other_sizes(tiny, trained):
    options = argparse.Namespace(draws=["3x2", "2x4"], test_sizes=[2 * tiny.data.image_size], repeats=1)
    found = list(rows_of("nested", tiny, options))
    sizes = [row["test_image_size"] // tiny.data.image_size for row in found]
    assert (sizes, [row["n_patches"] for row in found]) == ([1, 1, 1, 2], [6, 6, 8, 6])
    assert {row["images"] for row in found} == {3}
