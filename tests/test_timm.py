"""Networks of timm's in the place of an experiment's own: by a stand-in for timm, and by timm where it is installed."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ats.experiments.backbones import networks_of, resolved
from ats.experiments.build import build_model, make_view, view_size
from ats.experiments.colon_cancer import PRESETS as COLON_CANCER
from ats.experiments.commands.command_line import run
from ats.experiments.config import ExperimentConfig, ModelConfig
from ats.experiments.evaluation import evaluate
from ats.experiments.trained import load
from ats.experiments.training import InterruptedRunError, train
from ats.models import ATSClassifier
from ats.models.timm_networks import (
    TimmAttention,
    TimmFeatures,
    load_pretrained,
    pretrained_config,
    statistics,
    whole_name,
)
from tests.test_images_experiment import TWO, tiny, write_images
from tests.test_training import StopAt, assert_same, weights
from tests.timm_standin import MEAN, STD, Residual, StandIn


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    monkeypatch.setitem(sys.modules, "timm", found)
    return found


def state(seed: int = 5, **options: int) -> dict[str, Tensor]:
    """Weights that somebody trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Residual(**options).state_dict()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(state(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def with_model(config: ExperimentConfig, **model: object) -> ExperimentConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))  # type: ignore[arg-type]


def features_of(checkpoint: Path) -> dict[str, Tensor]:
    prefix = "model.sampling.feature.backbone."
    found = weights(checkpoint).items()
    return {name.removeprefix(prefix): value for name, value in found if name.startswith(prefix)}


def test_a_frozen_network_trains_nothing_of_itself_and_is_opened_without_its_file(
    timm: StandIn, file: Path, tmp_path: Path
) -> None:
    """From images to predictions: the file is read where the training begins, and never again."""
    manifest = write_images(tmp_path / "data", TWO)
    options = {"feature": "timm:resnet10", "feature_weights": file, "freeze": True}
    config = with_model(tiny(manifest, tmp_path / "run", epochs=2), **options)
    stopped = dataclasses.replace(config, output=tmp_path / "stopped")
    last = train(config)
    with pytest.raises(InterruptedRunError):
        train(stopped, callbacks=(StopAt(step=3),))
    file.unlink()
    calls = timm.pretrained_calls
    assert_same(weights(train(stopped)), weights(last))
    trained = load(tmp_path / "run")
    assert timm.pretrained_calls == calls
    assert trained.config.model.feature == "timm:resnet10.small"  # whose weights, whatever the default will be
    expected = {name: value for name, value in state().items() if not name.startswith("fc.")}
    assert_same(features_of(last), expected)  # batch norm's statistics among them
    assert isinstance(trained.model, ATSClassifier)
    sampling = trained.model.sampling
    feature = sampling.feature
    assert isinstance(feature, TimmFeatures)
    assert (sampling.sampler.mean, sampling.sampler.std) == (MEAN, STD)
    networks = networks_of(trained.config)
    assert networks.for_view == ((0.5,) * 3, (0.25,) * 3)  # the built-in attention's view, as ever
    feature.train()
    assert not feature.backbone.training
    assert feature.standardise.training
    graph = feature(torch.rand(4, 3, 16, 16))
    graph.square().sum().backward()
    assert all(value.grad is None for value in feature.backbone.parameters())
    assert feature.backbone(torch.rand(4, 3, 16, 16)).grad_fn is None
    assert feature.standardise.weight.grad is not None
    feature.eval()
    assert evaluate(trained).images == 4


def test_features_that_are_not_frozen_begin_with_the_pretrained_weights_and_learn(
    timm: StandIn, tmp_path: Path
) -> None:
    timm.hub["resnet10"] = state()
    manifest = write_images(tmp_path / "data", TWO)
    config = with_model(tiny(manifest, tmp_path / "run", epochs=1), feature="timm:resnet10", pretrained=True)
    begun: list[Tensor] = []

    class Look(StopAt):
        def on_train_start(self, trainer: object, module: nn.Module) -> None:  # type: ignore[override]
            begun.append(module.model.sampling.feature.backbone.conv1.weight.detach().clone())  # type: ignore

    found = features_of(train(config, callbacks=(Look(step=-1),)))["conv1.weight"]
    assert torch.equal(begun[0], state()["conv1.weight"])
    assert not torch.equal(found, begun[0])


def test_attention_by_the_first_stages_says_where_its_cells_lie(timm: StandIn, tmp_path: Path) -> None:
    timm.hub["resnet18"] = state(7)
    manifest = write_images(tmp_path / "data", TWO)
    config = tiny(manifest, tmp_path / "run", epochs=1)
    config = with_model(
        config, attention="timm:resnet18", pretrained=True, n_patches=2, feature_scale=2.0, attention_stride=8
    )
    trained = load(train(config))
    assert isinstance(trained.model, ATSClassifier)
    sampling = trained.model.sampling
    assert isinstance(sampling.attention, TimmAttention)
    # Each convolution of stride 2 that pads by half its kernel looks at even pixels: the first cell's centre is pixel
    # 0's, half a pixel from the edge, and cells are 8 pixels apart.
    placement = sampling.sampler.receptive_field
    assert [float(value) for value in (*placement.step, *placement.origin)] == [8, 8, -3.5, -3.5]  # type: ignore
    assert view_size(trained.config, (48, 48)) == (24, 24)
    view = make_view(trained.config, torch.full((1, 3, 48, 48), 255, dtype=torch.uint8))
    torch.testing.assert_close(view[0, :, 0, 0], (1 - torch.tensor(MEAN)) / torch.tensor(STD))
    assert sampling.attention(view).shape == (1, 1, 3, 3)
    assert list(sampling.sampler.mean) == [0.5] * 3  # type: ignore[arg-type]  # patches as ever
    rough = TimmAttention("resnet10", 3, 2)
    assert list(rough.backbone) == ["conv1", "bn1", "act1"]
    assert rough(torch.rand(2, 3, 16, 24)).shape == (2, 1, 8, 12)
    with pytest.raises(ValueError, match=r"has no stage of 16 view pixels a cell; choose one of .*-stride 2, 8$"):
        TimmAttention("resnet10", 3, 16)
    with pytest.raises(ValueError, match=r"timm:vit_small cannot be made: features_only not implemented"):
        build_model(with_model(config, attention="timm:vit_small"))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_any_bands_have_statistics_and_weights(timm: StandIn, channels: int) -> None:
    timm.hub["resnet10"] = state()
    mean, std = statistics("resnet10", channels)
    assert len(mean) == len(std) == channels
    assert mean == (pytest.approx(sum(MEAN) / 3),) if channels == 1 else mean[:2] == MEAN[:2]
    network = TimmFeatures("resnet10", channels, 16)
    assert load_pretrained(network) == []
    assert network(torch.rand(3, channels, 16, 16)).norm(dim=1).tolist() == pytest.approx([1.0] * 3, rel=1e-5)


def test_any_experiment_takes_them(timm: StandIn) -> None:
    """Deep MIL, positions and networks of a fixed input size, on colon cancer's images."""
    preset = COLON_CANCER["quick"]
    bags = build_model(with_model(preset, method="mil", feature="timm:resnet10"))
    assert bags.mean == MEAN
    assert bags(torch.zeros(1), torch.zeros(1, 3, 60, 60, dtype=torch.uint8))[0].shape == (1, 2)
    placed = build_model(with_model(preset, positions=True, feature="timm:vit_small", patch_size=24))
    view, image = torch.rand(2, 3, 24, 24), torch.zeros(2, 3, 120, 120, dtype=torch.uint8)
    assert placed(view, image)[0].shape == (2, 2)
    assert placed.sampling.feature.feature.options == {"num_classes": 0, "img_size": 24}
    config = with_model(preset, method="uniform", attention="timm:resnet10")
    assert build_model(config)(torch.rand(1, 3, 96, 96), image[:1])[0].shape == (1, 2)
    assert resolved(preset.model) == preset.model


def test_random_numbers_are_as_without_pretrained_weights(timm: StandIn, file: Path) -> None:
    network = TimmFeatures("resnet10", 3, 16)
    torch.manual_seed(3)
    load_pretrained(network, file)
    found = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(1))


def test_weights_of_another_network_are_refused(timm: StandIn, tmp_path: Path) -> None:
    """timm leaves out what does not fit in silence, so that a training would begin at random."""
    network = TimmFeatures("resnet10", 3, 16)
    other = tmp_path / "other.pth"
    torch.save({f"encoder.{name}": value for name, value in state().items()}, other)
    with pytest.raises(ValueError, match=r"other\.pth has no weights for 2 of 2 layers of timm:resnet10, e\.g\. conv1"):
        load_pretrained(network, other)
    torch.save(state() | {"conv1.weight": torch.zeros(9, 3, 7, 7)}, other)
    with pytest.raises(ValueError, match=r"other\.pth does not fit timm:resnet10: .*size mismatch for conv1\.weight"):
        load_pretrained(network, other)
    torch.save({"model": network}, other)
    with pytest.raises(ValueError, match=r"other\.pth holds more than numbers and texts"):
        load_pretrained(network, other)
    other.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"other\.pth holds more than numbers and texts, or is damaged"):
        load_pretrained(network, other)
    with pytest.raises(FileNotFoundError, match=r"there is no file of weights .*none\.pth"):
        load_pretrained(network, tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"cannot get them \(Max retries exceeded with url: /resnet10\); name a file"):
        load_pretrained(network)
    torch.save({name: value for name, value in state().items() if name != "conv1.weight"}, other)
    assert load_pretrained(network, other) == ["conv1.weight"]


def test_bad_options_are_a_line_each(
    timm: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, TWO)
    base = ["train", "images", "--data.manifest", str(tmp_path / "labels.csv"), "--output", str(tmp_path / "run")]
    base += ["--data.folds", "3", "--model.patch-size", "16", "--trainer.accelerator", "cpu"]

    def said(*options: str) -> str:
        assert run([*base, *options]) == 1
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return text

    assert "has no network 'resnet11'; names like it: resnet1" in said("--model.feature", "timm:resnet11")
    assert "no weights 'resnet10.big'; those of resnet10: resnet10.small" in said(
        "--model.feature", "timm:resnet10.big"
    )
    absent = str(tmp_path / "absent.pth")
    feature = ("--model.feature", "timm:resnet10")
    assert "there is no file of weights" in said(*feature, "--model.feature-weights", absent)
    assert "has no stage of 5 view pixels" in said(
        "--model.attention", "timm:resnet10", "--model.attention-stride", "5"
    )
    assert "timm:vit_small.small does not take patches of 4×4" in said(
        "--model.feature", "timm:vit_small", "--model.patch-size", "4"
    )
    monkeypatch.setitem(sys.modules, "timm", None)
    assert said(*feature).endswith(
        "timm is not installed; networks named timm:NAME need it: pip install 'torch-ats[timm]'\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": "resnet18"}, "must be timm:NAME, e.g. timm:resnet18"),
        ({"feature": "timm:"}, "must be timm:NAME"),
        ({"feature": "timm:hf-hub:a/b"}, "cannot be opened offline"),
        ({"pretrained": True}, "name one, e.g. model.feature timm:resnet18"),
        ({"freeze": True}, "leaves features as they begin"),
        ({"feature": "timm:a", "freeze": True}, "leaves features as they begin"),
        ({"feature_weights": Path("x")}, "which is missing"),
        ({"feature": "timm:a", "method": "cnn"}, "not cnn"),
        ({"attention": "timm:a", "method": "mil"}, "is for the methods ats, uniform, not mil"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_that_do_not_go_together(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        ModelConfig(**options)  # type: ignore[arg-type]


def test_the_page_runs_as_printed(timm: StandIn, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "images.md").read_text()
    section = page.partition("## Networks of timm's")[2].partition("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, TWO)
    timm.hub["resnet18"] = state()
    file.rename("resnet18.pth")
    commands = re.findall(r"^    ats ((?:.*\\\n)*.*)$", section, flags=re.MULTILINE)
    assert len(commands) == 3
    few = ["--optim.epochs", "1", "--model.patch-size", "16", "--model.n-patches", "2", "--trainer.accelerator", "cpu"]
    for number, command in enumerate(commands):
        words = shlex.split(command.replace("\\\n", ""))
        assert run([*words, *few, "--model.view-scale", "0.5", "--output", f"run-{number}"]) == 0
    assert run(["train", "images", "--help"]) == 0
    fields = {f"--model.{field.name.replace('_', '-')}" for field in dataclasses.fields(ModelConfig)}
    assert set(re.findall(r"--model[\w.-]+", section)) <= fields


def test_the_real_timm() -> None:
    pytest.importorskip("timm", reason="timm, of the extra of that name, is not installed: it brings torchvision")
    config = pretrained_config("resnet18")
    assert len(config.mean) == 3
    assert whole_name("resnet18").startswith("resnet18.")
    features = TimmFeatures("resnet18", 4, 32, frozen=True)
    assert features(torch.rand(2, 4, 32, 32)).shape == (2, 512)
    attention = TimmAttention("resnet18", 3, 8)
    assert attention(torch.rand(1, 3, 64, 48)).shape == (1, 1, 8, 6)
    transformer = TimmFeatures("vit_tiny_patch16_224", 3, 32)
    assert transformer(torch.rand(2, 3, 32, 32)).shape == (2, 192)
    with pytest.raises(ValueError, match=r"has no network 'resnet19'; names like it: .*resnet18"):
        pretrained_config("resnet19")
