"""`ats.datasets.synthetic`: what the writers put on disk is read by the loaders, can be learned, and is marked."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ats.datasets.colon_cancer import NUCLEI, load_colon_cancer
from ats.datasets.image_files import SYNTHETIC_MARKER
from ats.datasets.integers import Integers
from ats.datasets.speed_limits import load_speed_limits
from ats.datasets.synthetic import write
from ats.datasets.synthetic.write import write_colon_cancer, write_german, write_swedish
from ats.experiments.commands import synthesise
from ats.experiments.commands.command_line import run
from ats.functional import area_downsample

SMALL = {"size": (80, 120), "sign_size": (12, 20)}


def tissue(folder, **options):
    write_colon_cancer(folder, 4, **({"size": 128} | options))
    return load_colon_cancer(folder)


def german(folder, split="train", **options):
    write_german(folder, 16, 8, **(SMALL | options))
    return load_speed_limits(folder, split)


def swedish(folder, split="train", **options):
    write_swedish(folder, 16, 8, **(SMALL | options))
    return load_speed_limits(folder, split)


@pytest.mark.parametrize("suffix", [".jpg", ".ppm"])
def test_german(tmp_path, suffix):
    """As many of each class as asked for, in both splits; the frames that the loader has to leave out come on top."""
    data = german(tmp_path / "a", suffix=suffix)
    test = load_speed_limits(tmp_path / "a", "test")
    assert data.class_counts.tolist() == [4, 4, 4, 4]
    assert test.class_counts.tolist() == [2, 2, 2, 2]
    assert data.image_size == (80, 120)
    assert len(list((tmp_path / "a").glob(f"*{suffix}"))) == 18 + 9
    assert len(load_speed_limits(tmp_path / "a", "train", other_signs_are_none=True)) == 18
    assert re.fullmatch(r"(\d{5}\.ppm(;\d+){5}\n)+", (tmp_path / "a" / "gt.txt").read_text())
    assert test.examples[0].name >= "00600"


def test_german_as_large_as_the_benchmark_keeps_every_frame(tmp_path):
    """The loader takes 00881 for a second copy of 00613, so no synthetic frame may have that name."""
    write_german(tmp_path / "a", 8, 266, size=(30, 40), sign_size=(8, 10))
    assert len(load_speed_limits(tmp_path / "a", "test", other_signs_are_none=True)) == 266 + 33
    assert (tmp_path / "a" / "00882.jpg").exists()


def test_swedish(tmp_path):
    data = swedish(tmp_path / "a")
    assert data.class_counts.tolist() == [4, 4, 4, 4]
    assert load_speed_limits(tmp_path / "a", "test").class_counts.tolist() == [2, 2, 2, 2]
    assert len(load_speed_limits(tmp_path / "a", "train", other_signs_are_none=True)) == 17, "blurred limits stay out"
    annotations = (tmp_path / "a" / "Set1" / "annotations.txt").read_text()
    assert "BLURRED" in annotations
    assert "MISC_SIGNS;" in annotations


def test_colon_cancer(tmp_path):
    data = tissue(tmp_path / "a", size=500)
    assert data.class_counts.tolist() == [2, 2]
    for example in data.examples:
        kinds = [region.kind for region in example.regions]
        assert len(kinds) == 200, "as many nuclei as in the release"
        assert {kind for kind in NUCLEI if kind in kinds} == {
            kind for kind in NUCLEI if example.label or kind != NUCLEI[0]
        }
        assert all(12 <= c <= 488 for region in example.regions for c in region.centre)


@pytest.mark.parametrize("size", [64, 96])
def test_small_tissue_keeps_its_labels(tmp_path, size):
    """A positive image without an epithelial nucleus would be mislabelled."""
    write_colon_cancer(tmp_path / "a", 20, size=size)
    assert load_colon_cancer(tmp_path / "a").class_counts.tolist() == [10, 10]


@pytest.mark.parametrize("make", [tissue, german, swedish])
def test_reports_will_say_synthetic(tmp_path, make):
    data = make(tmp_path / "a")
    assert data.source.startswith("synthetic ")
    assert data.subset([0]).source.startswith("synthetic ")
    assert "Synthetic images, made up by torch-ats" in (tmp_path / "a" / SYNTHETIC_MARKER).read_text()


@pytest.mark.parametrize("make", [tissue, german, swedish])
def test_a_seed_decides(tmp_path, make):
    one, same, other = make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=1), make(tmp_path / "c", seed=2)
    for index in range(len(one)):
        assert torch.equal(one.image(index), same.image(index))
        assert not torch.equal(one.image(index), other.image(index))
        assert one.examples[index].regions == same.examples[index].regions
    assert not torch.equal(one.image(0), one.image(1))
    assert [example.regions for example in one.examples] != [example.regions for example in other.examples]


@pytest.mark.parametrize("make", [tissue, german, swedish])
def test_nothing_is_overwritten_and_nothing_left_half(tmp_path, make, monkeypatch):
    """A folder with a user's file is refused; a writer that fails leaves the folder as it was."""
    kept = tmp_path / "a" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{re.escape(str(kept.parent))} is there and not an empty folder"):
        make(kept.parent)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        make(kept)
    assert list(kept.parent.iterdir()) == [kept]
    kept.unlink()

    def full(path, data):
        if path.suffix in (".png", ".jpg"):
            raise OSError("No space left on device")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            make(kept.parent)
    assert list(kept.parent.iterdir()) == []
    assert len(make(kept.parent)) in (4, 16), "an empty folder will do"


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (write_colon_cancer, {"n_images": 1}, "n_images must be at least 2 and size at least 64 pixels, got 1 and 500"),
        (write_colon_cancer, {"size": 32}, "got 100 and 32"),
        (write_colon_cancer, {"suffix": ".jpg"}, "unknown suffix '.jpg', expected one of '.png', '.bmp'"),
        (write_colon_cancer, {"seed": -1}, "seed must be an integer of 0 to"),
        (write_german, {"seed": -1}, "seed must be an integer of 0 to"),
        (write_german, {"suffix": ".bmp"}, "expected one of '.jpg', '.ppm'"),
        (write_german, {"n_train": 3}, "at least one frame a class, got 3 frames"),
        (write_german, {"n_test": 267}, "n_test must leave room for others within 299 frames, got 267"),
        (write_german, {"limits": (30, 40)}, r"limits must be of 20, 30, 50, 60, 70, 80, 100, 120, got \(30, 40\)"),
        (write_german, {"sign_size": (12, 400)}, r"below two fifths of the height .* got \(12, 400\) for 800×1360"),
        (write_swedish, {"sign_size": (4, 20)}, "at least 8 pixels"),
        (write_swedish, {"n_test": 2}, "at least one frame a class, got 2 frames"),
        (write_swedish, {"limits": ()}, "needs limits"),
    ],
)
def test_what_no_data_set_can_have(tmp_path, write, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").iterdir())


def test_every_limit_is_drawn_where_the_truth_has_it(tmp_path):
    """Inside its box a limit has a red ring around a pale ground with dark digits; a street without has no such red."""
    write_german(tmp_path / "a", 18, 9, limits=(20, 30, 50, 60, 70, 80, 100, 120), sign_size=(20, 30), size=(160, 240))
    data = load_speed_limits(tmp_path / "a", "train", limits=(20, 30, 50, 60, 70, 80, 100, 120))
    seen = set()
    for index, example in enumerate(data.examples):
        red, green, blue = data.image(index).float()
        for region in example.targets:
            rows, columns = slice(region.top, region.bottom), slice(region.left, region.right)
            side = region.bottom - region.top
            redness = (red - green)[rows, columns]
            assert redness[side // 2, 1] > 80, "the left of the ring"
            assert redness[-2, side // 2] > 80, "the bottom of the ring"
            middle = blue[rows, columns][side // 3 : -(side // 3), side // 4 : -(side // 4)]
            assert middle.max() > 190
            assert middle.min() < 110
            seen.add(region.kind)
        if not example.label:
            assert (red - green).max() < 110
    assert len(seen) == 8


def errors(train, test):
    """Of ridge regression on one split's (X, labels), on the other's."""
    (inputs, labels), (unseen, expected) = train, test
    onehot = F.one_hot(labels).double()
    gram = inputs @ inputs.mT + 1e-2 * torch.eye(len(inputs), dtype=torch.float64)
    scores = unseen @ inputs.mT @ torch.linalg.solve(gram, onehot - onehot.mean(0)) + onehot.mean(0)
    return (scores.argmax(1) != expected).double().mean().item()


def signs(data, scale):
    """Every target, cut out of the view at `scale` and brought to one size: (n, pixels), and its label."""
    cuts, labels = [], []
    for index, example in enumerate(data.examples):
        image = data.image(index)[None]
        view = (
            area_downsample(image, tuple(round(side * scale) for side in data.image_size)) if scale < 1 else image / 255
        )
        for region in example.targets:
            top, left, bottom, right = (
                round(edge * scale) for edge in (region.top, region.left, region.bottom, region.right)
            )
            cuts.append(F.interpolate(view[:, :, top:bottom, left:right].double(), (20, 20), mode="bilinear").flatten())
            labels.append(example.label)
    cuts = torch.stack(cuts)
    return F.normalize(cuts - cuts.mean(1, keepdim=True)), torch.tensor(labels)


def test_limits_can_be_read_at_full_resolution_only(tmp_path):
    """The task in small: even given the place, a linear model errs on the view and does not on full resolution."""
    write_german(tmp_path / "a", 96, 64, size=(160, 240), sign_size=(12, 20))
    train, test = (load_speed_limits(tmp_path / "a", split) for split in ("train", "test"))
    assert errors(signs(train, 1), signs(test, 1)) <= 0.02
    assert errors(signs(train, 0.3), signs(test, 0.3)) >= 0.1


def nuclei(data, scale):
    """What a patch around nuclei of the two kinds that look alike from afar varies by: (n, 4), and whether a target."""
    found, labels = [], []
    for index, example in enumerate(data.examples):
        image = data.image(index)[None]
        if scale < 1:
            view = area_downsample(image, tuple(round(side * scale) for side in data.image_size))
            image = F.interpolate(view, data.image_size) * 255
        for region in example.regions:
            if region.kind in ("epithelial", "others"):
                y, x = map(int, region.centre)
                patch = image[0, :, y - 10 : y + 10, x - 10 : x + 10].double().mean(0)
                inner = patch[6:14, 6:14]
                found.append(torch.stack([patch.mean(), patch.std(), inner.std(), patch.diff().abs().mean()]))
                labels.append(int(region.target))
    return torch.stack(found), torch.tensor(labels)


def test_epithelial_nuclei_show_at_full_resolution_only(tmp_path):
    write_colon_cancer(tmp_path / "a", 16, size=256)
    data = load_colon_cancer(tmp_path / "a")
    result = {}
    for scale in (1, 0.2):
        inputs, labels = nuclei(data, scale)
        inputs = F.pad((inputs - inputs.mean(0)) / inputs.std(0), (0, 1), value=1)
        half = len(labels) // 2
        result[scale] = errors((inputs[:half], labels[:half]), (inputs[half:], labels[half:]))
    assert result[1] <= 0.02
    assert result[0.2] >= 0.08


def test_integers_are_the_same_everywhere():
    """Labels, places and folds rest on these: another stream would silently be another data set."""
    random = Integers(np.random.Philox(key=7), block=2)
    assert [random.below(100) for _ in range(5)] == [92, 55, 20, 22, 30]
    assert sorted(random.shuffled(list("abcdef"))) == list("abcdef")
    assert {random.between(2, 4) for _ in range(100)} == {2, 3, 4}
    assert random.bytes(11).shape == (11,)


def test_the_command(tmp_path, capsys, monkeypatch):
    """Writes what the loaders read, says what, and refuses to write over it."""
    assert run(["synthesise", "colon-cancer", str(tmp_path / "c"), "--images", "2", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert "synthetic CRCHistoPhenotypes, all: 2 images of 500×500 pixels" in said
    assert f"--data.folder {tmp_path / 'c'}" in said
    for source, name in (("german", "GTSDB"), ("swedish", "Swedish Traffic Signs")):
        writer = partial(getattr(synthesise, f"write_{source}"), **SMALL)
        monkeypatch.setattr(synthesise, f"write_{source}", writer)
        assert run(["synthesise", f"speed-limits-{source}", str(tmp_path / source), "--images", "8"]) == 0
        assert f"synthetic {name}, test: 4 images of 80×120 pixels (none: 1, " in capsys.readouterr().out
    assert run(["synthesise", "colon-cancer", str(tmp_path / "c")]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert run(["synthesise", "speed-limits-german", str(tmp_path / "d"), "--images", "3"]) == 1
    assert "at least one frame a class" in capsys.readouterr().err
