"""`ats.datasets.colon_cancer`: reading the release, its labels and nuclei, and the splits."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from ats.datasets.colon_cancer import (
    FIXED_SPLIT_SEEDS,
    NUCLEI,
    RELEASE,
    colon_cancer_folds,
    colon_cancer_split,
    load_colon_cancer,
)
from ats.datasets.image_dataset import Example, ImageDataset
from ats.datasets.image_files import SYNTHETIC_MARKER, default_folder
from ats.datasets.synthetic.write import write_colon_cancer

REAL = Path(os.environ.get("ATS_DATA", "")) / "colon-cancer"
needs_release = pytest.mark.skipif(
    "ATS_DATA" not in os.environ or not REAL.is_dir(),
    reason=f"the colon cancer images: set ATS_DATA to a folder that holds colon-cancer/{RELEASE}",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / RELEASE
    write_colon_cancer(folder, 6, size=96)
    return folder


@pytest.fixture
def release(original, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(original, tmp_path / RELEASE)


def test_labels_and_nuclei_are_those_of_the_annotations(original):
    """Each point of each .mat, x before y in the file, must end up in its image under its kind."""
    data = load_colon_cancer(original)
    assert [example.name for example in data.examples] == [f"img{number}" for number in range(1, 7)]
    for index, example in enumerate(data.examples):
        expected = [
            (y, x, kind)
            for kind in NUCLEI
            for x, y in loadmat(example.path.with_name(f"{example.name}_{kind}.mat"))["detection"].tolist()
        ]
        assert [(*region.centre, region.kind) for region in example.regions] == expected
        assert all(region.area == 0 for region in example.regions)
        assert data.label(index) == any(kind == "epithelial" for *_, kind in expected)
        assert {region.kind for region in example.targets} <= {"epithelial"}
        assert bool(example.targets) == bool(example.label)
    assert data.class_counts.tolist() == [3, 3]
    assert data.source == "synthetic CRCHistoPhenotypes"


def test_images_are_decoded_as_they_are(original):
    data = load_colon_cancer(original)
    image, label = data[4]
    with Image.open(original / "Classification" / "img5" / "img5.png") as file:
        expected = torch.from_numpy(np.array(file))
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert torch.equal(image, expected.permute(2, 0, 1))
    assert label == data.labels[4]
    assert data.image_size == image.shape[1:] == (96, 96)


def test_bmp_and_png_give_the_same(original, tmp_path):
    """The release has .bmp, lossless copies .png."""
    write_colon_cancer(tmp_path / "bmp", 6, size=96, suffix=".bmp")
    png, bmp = load_colon_cancer(original), load_colon_cancer(tmp_path / "bmp")
    assert {example.path.suffix for example in bmp.examples} == {".bmp"}
    for index in range(len(png)):
        assert torch.equal(png.image(index), bmp.image(index))
        assert png.examples[index].regions == bmp.examples[index].regions


@pytest.mark.parametrize("inner", [".", "..", "Classification"])
def test_the_folder_may_be_the_release_or_around_it(original, inner):
    assert len(load_colon_cancer(original / inner)) == 6
    assert load_colon_cancer(str(original / inner)).source.startswith("synthetic")


def test_images_are_in_the_order_of_their_numbers(tmp_path):
    """img10 after img9: a fold is of the same images wherever the file system lists them."""
    write_colon_cancer(tmp_path / "a", 11, size=64)
    assert [example.name for example in load_colon_cancer(tmp_path / "a").examples][-2:] == ["img10", "img11"]


def test_cache_and_subset(release):
    """A cached image is read once, from a subset as well; an uncached one each time."""
    cached, plain = load_colon_cancer(release, cache=True), load_colon_cancer(release)
    part = cached.subset(torch.tensor([3, 1]))
    assert [example.name for example in part.examples] == ["img4", "img2"]
    assert part.labels.tolist() == cached.labels[[3, 1]].tolist()
    assert (part.classes, part.source) == (cached.classes, cached.source)
    first = part.image(0)
    first_path = cached.examples[3].path
    first_path.unlink()
    assert torch.equal(cached.image(3), first)
    with pytest.raises(FileNotFoundError, match=r"img4\.png"):
        plain.image(3)
    with pytest.raises(FileNotFoundError, match=r"img4\.png"):
        _ = plain.subset([3]).image_size


def test_a_label_that_is_no_class():
    with pytest.raises(ValueError, match=r"x\.png: label 2 is no class; there are 2: a, b"):
        ImageDataset(("a", "b"), [Example("x", Path("x.png"), 2)], "test")
    with pytest.raises(ValueError, match="without images has no image size"):
        _ = ImageDataset(("a",), [], "test").image_size


def test_folds_test_every_image_once_and_spread_the_classes():
    labels = torch.tensor([1] * 51 + [0] * 49)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    folds = colon_cancer_folds(labels, seed=3)
    assert len(folds) == 10
    assert torch.equal(torch.cat([test for _, test in folds]).sort()[0], torch.arange(100))
    for train, test in folds:
        assert torch.equal(torch.cat([train, test]).sort()[0], torch.arange(100))
        assert len(test) == 10
        assert labels[test].sum() in (5, 6)
        assert torch.equal(test, test.sort()[0])
    for train, test in colon_cancer_folds(labels, 7, seed=3):  # sizes that do not divide
        assert len(test) in (14, 15)
        assert len(train) + len(test) == 100


def test_folds_depend_on_the_seed_alone():
    """The very folds are pinned: reported cross-validation is comparable between machines and versions."""
    labels = [0, 1] * 6
    folds = [test.tolist() for _, test in colon_cancer_folds(labels, 3, seed=0)]
    assert folds == [test.tolist() for _, test in colon_cancer_folds(torch.tensor(labels), 3, seed=0)]
    assert folds != [test.tolist() for _, test in colon_cancer_folds(labels, 3, seed=1)]
    assert folds == [[1, 2, 3, 4], [5, 6, 8, 9], [0, 7, 10, 11]]


def test_fixed_splits():
    labels = torch.tensor([1] * 51 + [0] * 49)
    splits = [colon_cancer_split(labels, seed=seed) for seed in FIXED_SPLIT_SEEDS]
    assert len({tuple(test.tolist()) for _, test in splits}) == 5, "five runs on five splits"
    for train, test in splits:
        assert (len(train), len(test)) == (80, 20)
        assert labels[test].sum() in (10, 11)
        assert not set(train.tolist()) & set(test.tolist())


@pytest.mark.parametrize(("labels", "folds"), [([0, 1] * 5, 1), ([0, 1] * 5, 6), ([0] * 9 + [1], 2), ([], 2)])
def test_folds_that_cannot_be(labels, folds):
    with pytest.raises(ValueError, match=rf"folds must be at least 2, .* which has \d; got {folds}"):
        colon_cancer_folds(labels, folds)


def write_points(path, **content):
    savemat(path, content)


DAMAGES = {
    "no annotation": ("img2_others.mat", Path.unlink, FileNotFoundError, "label is unknown"),
    "empty": ("img2_others.mat", lambda p: p.write_bytes(b""), ValueError, "damaged or no MATLAB file"),
    "cut": ("img2_others.mat", lambda p: p.write_bytes(p.read_bytes()[:-9]), ValueError, "damaged or no MATLAB file"),
    "text": ("img2_others.mat", lambda p: p.write_text("1 2\n" * 99), ValueError, "damaged or no MATLAB file"),
    "other variable": ("img2_others.mat", lambda p: write_points(p, x=[[1, 2]]), ValueError, "no variable `detection`"),
    "three columns": ("img2_others.mat", lambda p: write_points(p, detection=np.ones((4, 3))), ValueError, r"\(4, 3\)"),
    "words": ("img2_others.mat", lambda p: write_points(p, detection=np.array([["a", "b"]])), ValueError, "<U1"),
    "outside": ("img2_others.mat", lambda p: write_points(p, detection=[[5.0, 97]]), ValueError, "x = 5, y = 97 "),
    "negative": ("img2_others.mat", lambda p: write_points(p, detection=[[-1.0, 9]]), ValueError, "x = -1, y = 9"),
    "not a number": ("img2_others.mat", lambda p: write_points(p, detection=[[np.nan, 9]]), ValueError, "x = nan"),
    "no image": ("img2.png", Path.unlink, FileNotFoundError, r"neither img2\.bmp nor img2\.png"),
    "no picture": ("img2.png", lambda p: p.write_bytes(b"<html>"), ValueError, "damaged, cut short or no image"),
    "resized": ("img2.png", lambda p: Image.new("RGB", (100, 110)).save(p), ValueError, "110×100 but .*img1.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_names_itself(name, release):
    file, damage, error_type, message = DAMAGES[name]
    path = release / "Classification" / "img2" / file
    damage(path)
    with pytest.raises(error_type, match=message) as error:
        load_colon_cancer(release)
    assert "img2" in str(error.value)
    assert str(release) in str(error.value)


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_an_image_cut_short_names_itself(tmp_path, suffix):
    """Its header is whole, so it shows when it is decoded: never as an image with a grey lower half."""
    write_colon_cancer(tmp_path / "a", 2, size=96, suffix=suffix)
    path = tmp_path / "a" / "Classification" / "img1" / f"img1{suffix}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = load_colon_cancer(tmp_path / "a")
    with pytest.raises(ValueError, match=r"damaged, cut short or no image.*put a whole copy in its place") as error:
        data.image(0)
    assert str(path) in str(error.value)


def test_an_incomplete_release_is_refused(release):
    """Without the mark of synthetic data there must be a hundred images: results on fewer are not comparable."""
    (release / SYNTHETIC_MARKER).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 94 of 100 folders: img7, img8, img9, img10, img11, …"):
        load_colon_cancer(release)


def test_no_data_there(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match=r"is not the colon cancer data.*ats synthesise colon-cancer"):
            load_colon_cancer(folder)
    monkeypatch.delenv("ATS_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"where is colon-cancer.*ATS_DATA"):
        default_folder("colon-cancer")
    monkeypatch.setenv("ATS_DATA", str(tmp_path))
    assert default_folder("colon-cancer") == tmp_path / "colon-cancer"


@pytest.mark.parametrize(
    ("module", "package", "extra"), [("PIL.Image", "Pillow", "data"), ("scipy.io", "SciPy", "experiments")]
)
def test_without_an_optional_package(original, monkeypatch, module, package, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package} is not installed.*pip install 'torch-ats\[{extra}\]'"):
        load_colon_cancer(original)


def test_images_of_one_class(original, tmp_path):
    """With nothing but negatives a network learns in an epoch to say no, and 100% are right."""
    write_colon_cancer(tmp_path / "data", 4, size=64)
    images = tmp_path / "data" / "Classification"
    labels = {example.path.parent: example.label for example in load_colon_cancer(tmp_path / "data").examples}
    for folder, label in labels.items():
        if label:
            shutil.rmtree(folder)
    with pytest.raises(ValueError, match=rf"all 2 images in {images} are of one class, 'no epithelial nucleus'"):
        load_colon_cancer(tmp_path / "data")


@pytest.mark.parametrize("name", ["img03", "img٣"])
def test_a_folder_whose_number_is_written_in_another_way(release, name):
    """It would count as img3 a second time: once to train on, once to test on."""
    shutil.copytree(release / "Classification" / "img3", release / "Classification" / name)
    with pytest.raises(ValueError, match=rf"Classification/{name}: .*rename it to img3, or remove it"):
        load_colon_cancer(release)
    (release / "Classification" / "img03.txt").touch()
    shutil.rmtree(release / "Classification" / name)
    assert len(load_colon_cancer(release)) == 6


@needs_release
def test_the_release():
    """The published numbers of images, labels and nuclei."""
    data = load_colon_cancer(REAL)
    assert data.source == "CRCHistoPhenotypes"
    assert data.class_counts.tolist() == [49, 51]
    assert data.image_size == (500, 500)
    kinds = [region.kind for example in data.examples for region in example.regions]
    assert [kinds.count(kind) for kind in NUCLEI] == [7722, 5712, 6971, 2039]
    assert len(kinds) == 22_444
    assert data.image(99).float().mean() > 60, "bright field images"
    assert [len(test) for _, test in colon_cancer_folds(data.labels)] == [10] * 10
