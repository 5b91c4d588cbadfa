"""Limits drawn into photographs: what they look like, and which training images get one."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ats.datasets.painted_signs import SIDES, Look, draw_look, draw_sign, put_limit, within
from ats.datasets.synthetic.write import write_german, write_swedish
from ats.experiments.config import ExperimentConfig
from ats.experiments.registry import EXPERIMENTS, experiment_data
from ats.experiments.speed_limits import SpeedLimitsConfig

PLAIN = Look(
    red=(200, 30, 30),
    within=(230, 230, 230),
    black=(20, 20, 20),
    rim=0.0,
    ring=0.15,
    digits=0.55,
    narrow=1.0,
    bold=0.0,
    degrees=0.0,
    width=1.0,
    blur=0.0,
    noise=0.0,
)


def random(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_sign_is_a_red_ring_around_black_digits() -> None:
    sign = draw_sign(60, 30, PLAIN)
    assert sign.shape == (60, 60, 4)
    assert (sign[[0, 0, -1, -1], [0, -1, 0, -1], 3] == 0).all()  # transparent beside the disc
    assert sign[30, 4].tolist() == [200, 30, 30, 255]
    assert sign[12, 30].tolist() == [230, 230, 230, 255]
    dark = (sign[..., :3].max(-1) < 60) & (sign[..., 3] == 255)
    rows, columns = dark.nonzero()
    assert 0.03 < dark.mean() < 0.2
    assert abs(rows.mean() - 29.5) < 2
    assert abs(columns.mean() - 29.5) < 3


def test_signs_differ_in_their_digits_only() -> None:
    first, second = (draw_sign(80, limit, PLAIN).astype(int) for limit in (30, 50))
    differ = (first != second).any(-1)
    assert differ.any()
    assert not differ[:20].any()
    assert not differ[:, 50:].any()  # the zero
    three = draw_sign(80, 120, PLAIN)
    assert ((three[..., :3].max(-1) < 60) & (three[..., 3] == 255))[:, :20].any()  # three digits take more room


def test_looks_vary_within_what_can_be_seen() -> None:
    looks = [draw_look(random(seed), 40, within("Swedish Traffic Signs")) for seed in range(50)]
    assert len({look.red for look in looks}) == 50
    for look in looks:
        red, green, blue = look.red
        assert red > 1.5 * max(green, blue)
        assert look.within[0] > look.within[2] + 50  # yellow
        assert min(look.within[:2]) > max(look.black)
        assert look.width <= 1


def test_a_limit_is_put_on_a_copy_in_one_place() -> None:
    image = torch.full((3, 200, 300), 90, dtype=torch.uint8)
    sides = []
    for seed in range(30):
        shown = put_limit(image, random(seed), 70, within("GTSDB"))
        assert (image == 90).all()
        rows, columns = (shown != 90).any(0).nonzero(as_tuple=True)
        height, width = (int(values.max() - values.min()) + 1 for values in (rows, columns))
        sides.append(height)
        assert 0.6 * height < width < 1.2 * height
        assert torch.equal(shown, put_limit(image, random(seed), 70, within("GTSDB")))
    assert SIDES[0] * 0.8 < min(sides) < 25
    assert 70 < max(sides) <= SIDES[1]


def test_a_small_image_is_refused() -> None:
    with pytest.raises(ValueError, match="100×300 pixels has no place"):
        put_limit(torch.zeros(3, 100, 300, dtype=torch.uint8), random(0), 50, within("GTSDB"))


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "german"
    write_german(folder, 8, 4, size=(160, 240), sign_size=(12, 30), limits=(30, 50, 70))
    return folder


def a_config(folder: Path, drawn_limits: float) -> ExperimentConfig:
    data = SpeedLimitsConfig(folder=folder, drawn_limits=drawn_limits, probability=0.0)
    return dataclasses.replace(EXPERIMENTS["speed-limits"].presets["quick"], data=data)


def test_photographs_without_a_limit_get_one_in_a_share_of_the_epochs(german: Path) -> None:
    data = experiment_data(a_config(german, 0.6))
    plain = experiment_data(a_config(german, 0.0))
    own = data.labels("train")
    indices = torch.arange(len(own))
    drawn = torch.zeros(4, dtype=torch.float64)
    for epoch in range(200):
        images, labels = data.examples("train", indices, epoch)
        unchanged, same = plain.examples("train", indices, epoch)
        assert torch.equal(same, own)
        changed = (images != unchanged).flatten(1).any(1)
        assert torch.equal(changed, labels != own)  # an image that shows a drawn limit has it for its label
        assert not changed[own > 0].any()
        drawn += labels.bincount(minlength=4)
    assert torch.equal(data.examples("train", indices, 7)[0], data.examples("train", indices, 7)[0])
    torch.testing.assert_close(drawn / 200, data.class_counts(), atol=0.2, rtol=0)
    assert data.class_counts().sum() == len(own)
    torch.testing.assert_close(plain.class_counts(), own.bincount(minlength=4).double())


def test_no_limit_is_drawn_for_a_test(german: Path) -> None:
    data, plain = (experiment_data(a_config(german, share)) for share in (0.9, 0.0))
    for name in ("train", "test"):
        indices = torch.arange(len(data.labels(name)))
        for ours, theirs in zip(data.examples(name, indices), plain.examples(name, indices), strict=True):
            assert torch.equal(ours, theirs)


def test_signs_are_yellow_within_on_the_swedish_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_swedish(tmp_path / "signs", 8, 4, size=(160, 240), sign_size=(12, 30))
    seen = []

    def note(image: torch.Tensor, random: np.random.Generator, limit: int, colour: object) -> torch.Tensor:
        seen.append((limit, colour))
        return image

    monkeypatch.setattr("ats.experiments.speed_limits.put_limit", note)
    data = experiment_data(a_config(tmp_path / "signs", 0.9))
    for epoch in range(20):
        data.examples("train", torch.arange(8), epoch)
    assert {colour for _, colour in seen} == {within("Swedish Traffic Signs")}
    assert {limit for limit, _ in seen} == {50, 70, 80}


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_leaves_no_photograph_as_it_is_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="drawn_limits must be at least 0 and below 1"):
        SpeedLimitsConfig(drawn_limits=share)
