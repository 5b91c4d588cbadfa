"""The evidence head: its formulas, what it leaves exact, what it is taught by, and that nothing changes without it."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ats
from ats.experiments.build import build_model
from ats.experiments.commands import train as train_command
from ats.experiments.commands.command_line import run
from ats.experiments.config import ExperimentConfig
from ats.experiments.evaluation import evaluate
from ats.experiments.registry import EXPERIMENTS
from ats.experiments.training import InterruptedRunError, train
from ats.models import EvidenceClassifier, megapixel_mnist
from ats.models.classifier import ChannelsLast, L2Normalise, SharingLayers, SoftBound, conv_norm
from ats.models.evidence import EvidenceAttention
from ats.models.images import image_networks
from tests.enumeration import enumerate_draws
from tests.helpers import assert_close, randn, seeded
from tests.test_training import StopAt, assert_same, tiny, weights

HEADS = ["cells", "peaks"]


def small_attention(*, peaks: bool = True) -> EvidenceAttention:
    """In float64 and evaluation mode, with an evidence head that says something."""
    torch.manual_seed(0)
    own = SharingLayers(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1), depth=2)
    attention = EvidenceAttention(own, 3, bound=5.0, peaks=peaks)
    with torch.no_grad():
        attention.evidence[-1].weight.normal_(generator=seeded(1))
    return attention.double().eval()


def small_model(n_patches: int = 3, **options: object) -> EvidenceClassifier:
    """Of three classes; patches of 4×4."""
    feature = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), L2Normalise()).double()
    sampling = ats.nn.AttentionSampling(small_attention(), feature, n_patches, 4, receptive_field=0, **options)
    return EvidenceClassifier(sampling, 5, 3, feature_scale=2.0).double().eval()


@pytest.mark.parametrize("peaks", [False, True])
def test_logits_are_by_the_formula(peaks: bool) -> None:
    attention, view = small_attention(peaks=peaks), randn(2, 1, 5, 6)
    with torch.no_grad():
        maps = torch.tanh(attention.own[0](view))
        own, evidence = attention.own[2](maps)[:, 0], attention.evidence(maps)[:, 0]
        logits = attention(view)[:, 0]
    for image in range(2):
        for row in range(5):
            for column in range(6):
                here = float(evidence[image, row, column])
                expected = 5 * math.tanh((float(own[image, row, column]) + 4 * (here + 1.4)) / 5)
                if peaks:
                    around = evidence[image, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
                    expected -= 3 * math.tanh(2 * (float(around.max()) - here))
                assert float(logits[image, row, column]) == pytest.approx(expected, rel=1e-12)
    assert float(evidence.std()) > 0.05  # there is something to see


@pytest.mark.parametrize("networks", ["modern", "wide"])
def test_a_fresh_head_changes_no_logit(networks: str) -> None:
    view = torch.rand(2, 1, 12, 15, generator=seeded())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain = megapixel_mnist.attention_network(networks)
        torch.manual_seed(3)
        attention = megapixel_mnist.evidence_network(networks, peaks=True)
    assert torch.equal(attention(view), plain(view))
    assert torch.equal(attention.evidence(attention.own.trunk(view)), torch.full((2, 1, 4, 5), -1.4))


def test_without_it_the_recipe_is_what_it_was() -> None:
    """The same weights from the same random numbers, under the same names, and the same arithmetic."""
    torch.manual_seed(5)
    attention = megapixel_mnist.attention_network("modern")
    torch.manual_seed(5)
    layers = nn.Sequential(
        ChannelsLast(),
        *conv_norm(1, 16, kernel=3),
        *conv_norm(16, 16, kernel=3),
        nn.MaxPool2d(3),
        *conv_norm(16, 32, kernel=3),
        nn.Conv2d(32, 1, 3, padding=1),
    )
    names = [*layers.state_dict()]
    assert sorted(attention.state_dict()) == sorted(["0.weight", "1.limit", *(f"0.{name}" for name in names)])
    assert all(torch.equal(attention.state_dict()[f"0.{name}"], layers.state_dict()[name]) for name in names)
    view = torch.rand(2, 1, 12, 15, generator=seeded())
    assert torch.equal(attention(view), SoftBound(5.0)(layers(view) + 10.0 * F.max_pool2d(view, 3)))


def test_own_logits_keep_the_exact_gradient() -> None:
    """In the mean over all draws it is that of the full model; the head has none of it."""
    model, view, image = small_model(n_patches=2), randn(1, 1, 2, 3), randn(1, 1, 8, 12, seed=1)
    sampling, last = model.sampling, model.sampling.attention.own[2].weight
    loss_of = randn(1, 5, seed=2)
    (expected,) = torch.autograd.grad((sampling.full(view, image) * loss_of).sum(), last)
    draws, chances = enumerate_draws(sampling.attention(view).flatten().softmax(0).detach(), 2)
    total = torch.zeros_like(expected)
    for draw, chance in zip(draws, chances, strict=True):
        logits = sampling.attention(view)
        log_attention = logits.flatten(1).log_softmax(-1)[:, draw]
        patches, offsets = sampling.read_cells(image, draw[None], (2, 3), (2, 3))
        features = sampling.patch_features(patches, offsets, (8, 12))
        loss = (ats.expectation(features, log_attention) * loss_of).sum()
        (gradient, *none) = torch.autograd.grad(
            loss, [last, *sampling.attention.evidence.parameters()], allow_unused=True
        )
        assert none == [None] * 5
        total += chance * gradient
    assert_close(total, expected)


def in_words(model: EvidenceClassifier, evidence: Tensor, features: Tensor, cells: Tensor, label: int) -> list[float]:
    """10·BCE of one image's cells, one by one."""
    losses = []
    for cell, feature in zip(cells.tolist(), features, strict=True):
        logits = [0.3 * 2.0 * float(row @ feature) for row in model.head.weight]
        r = math.exp(logits[label]) / sum(map(math.exp, logits))
        p = 1 / (1 + math.exp(-float(evidence.flatten()[cell])))
        losses.append(-10 * (r * math.log(p) + (1 - r) * math.log(1 - p)))
    return losses


@pytest.mark.parametrize("sizes", ["one", "several"])
def test_the_head_is_taught_what_patches_alone_say(sizes: str) -> None:
    """Of two draws each, masked; of views of several sizes, one with fewer cells than are drawn."""
    image, view = randn(3, 1, 16, 24, seed=1), randn(3, 1, 4, 6, seed=2)
    label, mask = torch.tensor([2, 0, 1]), torch.rand(3, 4, 6, generator=seeded(3)) < 0.7
    options: dict[str, object] = {}
    if sizes == "several":
        image = [image[0], image[1, :, :8, :4], image[2]]
        view = [view[0], view[1, :, :2, :1], view[2]]
        mask, options = None, {"allow_fewer": True}
    model = small_model(**options)
    logits, sample, loss = model.teach(view, image, label, mask=mask, generator=seeded(7), draws=2)
    plain, same = model(view, image, mask=mask, generator=seeded(7), draws=2)
    assert torch.equal(logits, plain)
    assert torch.equal(sample.indices, same.indices)
    with torch.no_grad():
        _, samples = model.draw(view, image, mask=mask, generator=seeded(7), draws=2)
        losses = []
        for drawn in samples:
            found: list[float] = []
            for number in range(3):
                alone = drawn[number].indices[0]
                grid, own = drawn.own_grids()[number], alone[alone >= 0]
                assert len(own) == (2 if sizes == "several" and number == 1 else 3)
                cells = own // drawn.grid_size[1] * grid[1] + own % drawn.grid_size[1]
                attention = model.sampling.attention
                evidence = attention.evidence(attention.own.trunk(view[number][None]))
                features = model.sampling.feature(drawn.patches[number][: len(own)].double())
                found += in_words(model, evidence, features, cells, int(label[number]))
            losses.append(sum(found) / len(found))
    assert float(loss.detach()) == pytest.approx(sum(losses) / 2, rel=1e-9)
    loss.backward()
    taught = {name for name, value in model.named_parameters() if value.grad is not None}
    assert {name.removeprefix("sampling.attention.").partition(".")[0] for name in taught} == {"evidence", "own"}
    assert all(name.startswith(("sampling.attention.evidence", "sampling.attention.own.0")) for name in taught)


@pytest.mark.parametrize("experiment", ["megapixel-mnist", "colon-cancer", "speed-limits"])
def test_every_recipe_can_have_one(experiment: str) -> None:
    """With cells where they are without it."""
    config = with_model(EXPERIMENTS[experiment].presets["quick"], evidence="peaks")
    model, stride = build_model(config), config.data.networks_for(config.model).stride
    assert isinstance(model, EvidenceClassifier)
    assert model.sampling.sampler.receptive_field == ats.Placement([0, 0], [stride, stride])
    view = torch.rand(1, config.data.channels, 48, 96)
    assert model.sampling.attention(view).shape == (1, 1, 48 // stride, 96 // stride)


def test_images_of_ones_own_can_have_one() -> None:
    networks = image_networks(2, [0.5] * 2, [0.2] * 2)
    assert networks.evidence is not None
    attention, view = networks.evidence(peaks=False), torch.rand(1, 2, 12, 16)
    assert attention(view).shape == networks.attention()(view).shape == (1, 1, 6, 8)


def with_model(config: ExperimentConfig, **changes: object) -> ExperimentConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def test_a_training_with_it_stops_goes_on_and_is_used(tmp_path: Path) -> None:
    """As one that never stopped; its head has learned, and whatever takes a run takes this one."""
    whole = train(with_model(tiny(tmp_path / "whole"), evidence="peaks"))
    config = with_model(tiny(tmp_path / "stopped"), evidence="peaks")
    with pytest.raises(InterruptedRunError):
        train(config, callbacks=(StopAt(step=2 * 3 + 1),))
    assert_same(weights(train(config)), weights(whole))
    (log,) = (config.run_folder / "csv").glob("version_*/metrics.csv")
    assert "train/evidence" in log.read_text().splitlines()[0].split(",")
    assert float(weights(whole)["model.sampling.attention.evidence.3.weight"].abs().max()) > 0.005
    trained = ats.load(whole)
    assert isinstance(trained.model, EvidenceClassifier)
    assert evaluate(trained, images=4, method="topk", n_patches=4).images == 4
    assert trained.predict(torch.zeros(1, 140, 140, dtype=torch.uint8), generator=seeded()).logits.shape == (1, 10)
    with pytest.raises(ValueError, match=r"model\.evidence: peaks -> none"):
        train(tiny(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model.method mil", "model.evidence teaches attention, and model.method=mil learns none"),
        ("--model.method cnn", "model.method=cnn learns none"),
        ("--model.method uniform", "model.method=uniform learns none"),
        ("--model.networks paper", "the networks 'paper' of megapixel-mnist have no evidence head"),
        ("--model.levels 128:10 4:2", "model.evidence is for attention on one view, not for model.levels"),
        ("--model.attention timm:resnet18", "needs the experiment's own attention network"),
    ],
)
def test_where_there_is_nothing_to_teach_it_is_refused(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"train megapixel-mnist --preset demo --output {tmp_path / 'run'} --model.evidence cells {options}"
    assert run(arguments.split()) != 0
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_number_is_no_class_to_speak_for() -> None:
    config = EXPERIMENTS["images"].presets["quick"]
    data = dataclasses.replace(config.data, task="value", centre=0.0, spread=1.0)
    with pytest.raises(ValueError, match=r"model\.evidence asks which class a patch speaks for"):
        build_model(with_model(dataclasses.replace(config, data=data), evidence="cells"))


def test_other_attention_is_refused() -> None:
    sampling = ats.nn.AttentionSampling(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), 2, 4)
    with pytest.raises(TypeError, match=r"must be an EvidenceAttention, got Conv2d"):
        EvidenceClassifier(sampling, 16, 2)


def test_a_recipe_with_a_head_takes_other_methods_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[ExperimentConfig] = []
    monkeypatch.setattr(train_command, "train", lambda config: configs.append(config) or Path("last.ckpt"))
    for options in ("", "--model.method uniform", "--model.method=cnn", "--model.method ats --model.evidence none"):
        assert run(f"train megapixel-mnist --preset quick {options}".split()) == 0
    assert [config.model.evidence for config in configs] == ["peaks", "none", "none", "none"]
    refused = ["--model.method", "uniform", "--model.evidence", "cells"]
    assert run(["train", "megapixel-mnist", "--preset", "quick", *refused]) != 0
