"""`ats.datasets.speed_limits` and `traffic_signs`: which frames are kept, with which label, from both sources."""

import os
from pathlib import Path

import pytest
from PIL import Image

from ats.datasets.image_files import SYNTHETIC_MARKER
from ats.datasets.speed_limits import GERMAN_FOLDER, load_speed_limits

REAL = Path(os.environ.get("ATS_DATA", "")) / "speed-limits"
needs_german = pytest.mark.skipif(
    "ATS_DATA" not in os.environ or not (REAL / GERMAN_FOLDER).is_dir(),
    reason=f"the German signs: set ATS_DATA to a folder that holds speed-limits/{GERMAN_FOLDER}",
)


def frame(path, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)


def german(folder, lines, names):
    for name in names:
        frame(folder / name)
    (folder / "gt.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


# Frame, its signs (box and class id), and its label among none, 30, 50, 70; None: left out.
GERMAN_CASES = {
    "00000": ([], "none"),
    "00001": (["1;2;9;10;1"], "30"),
    "00002": (["1;2;9;10;2", "20;2;28;10;2"], "50"),
    "00003": (["1;2;9;10;4", "20;2;40;22;11"], "70"),
    "00004": (["1;2;9;10;13"], None),  # another sign only
    "00005": (["1;2;9;10;5"], None),  # a limit that is no class
    "00006": (["1;2;9;10;6"], None),  # the end of a limit is no limit
    "00007": (["1;2;9;10;1", "20;2;30;12;4", "40;2;48;10;2"], "70"),  # the largest decides
    "00008": (["1;2;9;10;1", "20;2;40;22;5"], "30"),  # among those that are classes
    "00599": (["1;2;9;10;2"], "50"),
}
GERMAN_TEST_CASES = {"00600": (["1;2;9;10;4"], "70"), "00899": ([], "none")}


@pytest.fixture(params=[".ppm", ".jpg"])
def benchmark_folder(request, tmp_path):
    cases = GERMAN_CASES | GERMAN_TEST_CASES
    lines = [f"{name}.ppm;{sign}" for name, (signs, _) in cases.items() for sign in signs]
    return german(tmp_path / GERMAN_FOLDER, lines, [f"{name}{request.param}" for name in cases])


def labels_of(data):
    return {example.name: data.classes[example.label] for example in data.examples}


def test_german_labels(benchmark_folder):
    """Every rule of the filter, on a frame of its own; gt.txt says .ppm whatever the files are."""
    data = load_speed_limits(benchmark_folder, "train")
    assert labels_of(data) == {name: label for name, (_, label) in GERMAN_CASES.items() if label}
    assert data.classes == ("none", "30", "50", "70")
    assert data.source == "GTSDB"
    assert data.image_size == (40, 60)
    test = load_speed_limits(benchmark_folder.parent, "test")
    assert labels_of(test) == {name: label for name, (_, label) in GERMAN_TEST_CASES.items()}


def test_german_regions(benchmark_folder):
    """Limits with their boxes, top before left; the targets are the signs that the label is about."""
    examples = {example.name: example for example in load_speed_limits(benchmark_folder, "train").examples}
    (sign,) = examples["00001"].targets
    assert (sign.top, sign.left, sign.bottom, sign.right, sign.kind) == (2, 1, 10, 9, "speed-limit-30")
    assert sign.centre == (6, 5)
    assert sign.area == 64
    assert [(region.left, region.target) for region in examples["00002"].regions] == [(1, True), (20, True)]
    assert [region.kind for region in examples["00003"].regions] == ["speed-limit-70"], "other signs are no regions"
    assert [(region.kind[-2:], region.target) for region in examples["00007"].regions] == [
        ("30", False), ("70", True), ("50", False)
    ]  # fmt: skip
    assert [(region.kind[-2:], region.target) for region in examples["00008"].regions] == [("30", True), ("80", False)]
    assert examples["00000"].regions == ()


def test_german_frames_with_other_signs_may_be_none(benchmark_folder):
    data = load_speed_limits(benchmark_folder, "train", other_signs_are_none=True)
    assert labels_of(data) == {name: label or "none" for name, (_, label) in GERMAN_CASES.items()}


def test_german_limits_can_be_chosen(benchmark_folder):
    """Classes come in the order that was asked for, and what is no class any more is another sign."""
    data = load_speed_limits(benchmark_folder, "train", limits=(80, 50))
    assert data.classes == ("none", "80", "50")
    names = {"00000": "none", "00002": "50", "00005": "80", "00007": "50", "00008": "80", "00599": "50"}
    assert labels_of(data) == names


def test_german_duplicate(tmp_path):
    """00881 is the same picture as 00613: in both it would count twice in the test error."""
    lines = [f"{name}.ppm;1;2;9;10;{kind}" for name in ("00613", "00881") for kind in (5,)]
    folder = german(tmp_path, lines, ["00613.jpg", "00881.jpg"])
    assert labels_of(load_speed_limits(folder, "test", limits=(80,))) == {"00613": "80"}
    (folder / "00613.jpg").unlink()
    (folder / "gt.txt").write_text(lines[1])
    assert labels_of(load_speed_limits(folder, "test", limits=(80,))) == {"00881": "80"}


def test_german_ppm_is_taken_before_jpg(tmp_path):
    """A frame in two formats counts once, from the file without losses; crops and notes beside it don't count."""
    folder = german(tmp_path, [], ["00600.jpg", "00600.ppm", "00/00001.ppm", "notes.jpg"])
    (example,) = load_speed_limits(folder, "test").examples
    assert example.path.name == "00600.ppm"


def test_boxes_end_at_the_image(tmp_path):
    folder = german(tmp_path, ["00600.ppm;-5;30;70;45;2"], ["00600.jpg"])
    (sign,) = load_speed_limits(folder, "test").examples[0].targets
    assert (sign.top, sign.left, sign.bottom, sign.right) == (30, 0, 40, 60)


def test_a_box_far_out_of_its_image_is_refused(tmp_path):
    folder = german(tmp_path, ["00600.ppm;5;30;77;45;2"], ["00600.jpg"])
    with pytest.raises(
        ValueError, match=r"gt.txt, line 1: the speed-limit-50 with .* = 5, 30, 77, 45 is .* not within"
    ):
        load_speed_limits(folder, "test")


def test_images_are_looked_for_where_ats_data_says(tmp_path, monkeypatch):
    german(tmp_path / "speed-limits" / GERMAN_FOLDER, [], ["00600.jpg"])
    monkeypatch.setenv("ATS_DATA", str(tmp_path))
    assert len(load_speed_limits(None, "test")) == 1
    monkeypatch.delenv("ATS_DATA")
    with pytest.raises(FileNotFoundError, match="where is speed-limits"):
        load_speed_limits(None, "test")


def swedish_sign(name, visibility="VISIBLE", box="9.25, 10, 1, 2.50", kind="PROHIBITORY"):
    return f"{visibility}, {box}, {kind}, {name};"


SMALL, LARGE = "9, 10, 1, 2", "40, 30, 10, 5"
SWEDISH_CASES = {
    "a": ("", "none"),
    "b": ("MISC_SIGNS;", "none"),
    "c": (swedish_sign("50_SIGN"), "50"),
    "d": (swedish_sign("PASS_RIGHT_SIDE", kind="MANDATORY"), None),
    "e": (swedish_sign("60_SIGN"), None),
    "f": (swedish_sign("70_SIGN", "BLURRED"), None),
    "g": (swedish_sign("80_SIGN", "OCCLUDED", LARGE) + swedish_sign("70_SIGN", box=SMALL), "70"),
    "h": (swedish_sign("80_SIGN", box=SMALL) + swedish_sign("50_SIGN", box=LARGE), "50"),
    "i": (swedish_sign("80_SIGN", "SIDE_ROAD") + swedish_sign("STOP"), None),
    "j": (swedish_sign("80_SIGN") + swedish_sign("60_SIGN", box=LARGE) + "MISC_SIGNS;", "80"),
    "k": (swedish_sign("70_SIGN", box="9.25l, 10.00, 1.0, 2.50"), "70"),
}


def swedish(folder, cases, inner="Set1", images=""):
    for name in cases:
        frame(folder / inner / images / f"{name}.jpg")
    (folder / inner / "annotations.txt").write_text("".join(f"{name}.jpg:{text}\n" for name, text in cases.items()))
    return folder


@pytest.mark.parametrize(("inner", "split"), [("Set1", "train"), ("Set2", "test")])
@pytest.mark.parametrize("images", ["", "Part0"])
def test_swedish_labels(tmp_path, inner, split, images):
    """The paper's filter; frames beside annotations.txt or as Set1Part0.zip unpacks."""
    cases = {name: text for name, (text, _) in SWEDISH_CASES.items()}
    data = load_speed_limits(swedish(tmp_path, cases, inner, images and f"{inner}{images}"), split)
    assert labels_of(data) == {name: label for name, (_, label) in SWEDISH_CASES.items() if label}
    assert data.classes == ("none", "50", "70", "80")
    assert data.source == "Swedish Traffic Signs"
    assert data[2][0].shape == (3, 40, 60)


def test_swedish_regions(tmp_path):
    """The file gives the lower right corner first."""
    cases = {name: text for name, (text, _) in SWEDISH_CASES.items()}
    examples = {example.name: example for example in load_speed_limits(swedish(tmp_path, cases), "train").examples}
    for name in ("c", "k"):
        (sign,) = examples[name].targets
        assert (sign.top, sign.left, sign.bottom, sign.right) == (2.5, 1, 10, 9.25)
    assert [(region.kind, region.target) for region in examples["g"].regions] == [
        ("speed-limit-80", False), ("speed-limit-70", True)
    ]  # fmt: skip


def test_which_source(tmp_path):
    """Where both lie in one folder, the user says which."""
    german(tmp_path, [f"0000{kind}.ppm;1;2;9;10;{kind}" for kind in (1, 2, 4)], [f"0000{n}.jpg" for n in range(5)])
    swedish(tmp_path, {"a": ""}, "Set2")
    with pytest.raises(ValueError, match="source='german' or source='swedish'"):
        load_speed_limits(tmp_path, "train")
    assert load_speed_limits(tmp_path, "test", source="swedish").source == "Swedish Traffic Signs"
    assert load_speed_limits(tmp_path, "train", source="german").source == "GTSDB"
    (tmp_path / SYNTHETIC_MARKER).touch()
    assert load_speed_limits(tmp_path, "train", source="german").source == "synthetic GTSDB"
    with pytest.raises(ValueError, match="unknown source 'dutch', expected 'auto', 'german' or 'swedish'"):
        load_speed_limits(tmp_path, "train", source="dutch")
    with pytest.raises(ValueError, match="unknown split 'validation', expected 'train' or 'test'"):
        load_speed_limits(tmp_path, "validation")
    for limits, message in (((35,), "no limit of 35; limits are 20, 30, 50"), ((), "at least one"), ((30, 30), "once")):
        with pytest.raises(ValueError, match=message):
            load_speed_limits(tmp_path, "train", source="german", limits=limits)


def test_no_data_there(tmp_path):
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match=r"no traffic signs \(source='auto'\).*gt.txt.*Set1/ and Set2/"):
            load_speed_limits(folder, "train")


@pytest.mark.parametrize(
    "line",
    [
        "00600.ppm;1;2;9;10",
        "00600.ppm;1;2;9;1O;2",
        "600.ppm;1;2;9;10;2",
        "00600.ppm;1;2;9;10;43",
        "00600.ppm;1;2;",
        "x",
    ],
)
def test_a_german_line_that_cannot_be_read(tmp_path, line):
    """Cut short or damaged: never a frame less, or one taken for a street without signs."""
    folder = german(tmp_path, ["00601.ppm;1;2;9;10;2", "", line], ["00600.jpg", "00601.jpg"])
    with pytest.raises(ValueError, match=rf"gt.txt, line 3: '{line}' cannot be read") as error:
        load_speed_limits(folder, "test")
    assert str(folder) in str(error.value)


GOOD = swedish_sign("50_SIGN")
SWEDISH_LINES = {
    "no colon": ("a.jpg", "line 2: 'a.jpg' cannot be read; expected NAME.jpg:"),
    "no name": (f":{GOOD}", "line 2: .* cannot be read; expected NAME.jpg:"),
    "cut": (f"a.jpg:{GOOD}{GOOD[:-5]}", "line 2: .*50_' has no semicolon after it, the file was cut short"),
    "a file elsewhere": (f"../../x.jpg:{GOOD}", r"line 2: '../../x.jpg' is no image's name in .*Set2; names have no"),
    "an absolute path": (f"/etc/x.jpg:{GOOD}", "line 2: '/etc/x.jpg' is no image's name"),
    "the folder above": (f"..:{GOOD}", r"line 2: '\.\.' is no image's name"),
    "a Windows path": (f"a\\b.jpg:{GOOD}", "line 2: .* is no image's name"),
    "six fields": ("a.jpg:VISIBLE, 9, 10, 1, 2, 50_SIGN;", "line 2: 'VISIBLE, 9, 10, 1, 2, 50_SIGN' cannot be read"),
    "a word": (f"a.jpg:{swedish_sign('50_SIGN', box='9, x, 1, 2')}", "line 2: .*cannot be read; expected VISIBILITY"),
    "a limit's name": (f"a.jpg:{swedish_sign('50_SIGNX')}", "'50_SIGNX' is no sign's name; a limit's is like 50_SIGN"),
    "visibility": (f"a.jpg:{swedish_sign('50_SIGN', 'CLEAR')}", "one of VISIBLE, BLURRED, SIDE_ROAD, OCCLUDED"),
}


@pytest.mark.parametrize("name", SWEDISH_LINES)
def test_a_swedish_line_that_cannot_be_read(tmp_path, name):
    line, message = SWEDISH_LINES[name]
    swedish(tmp_path, {"b": "", "a": ""}, "Set2")
    (tmp_path / "Set2" / "annotations.txt").write_text(f"b.jpg:\n{line}\n")
    with pytest.raises(ValueError, match=message) as error:
        load_speed_limits(tmp_path, "test")
    assert str(tmp_path / "Set2" / "annotations.txt") in str(error.value)


def test_what_is_missing_or_does_not_fit_names_itself(tmp_path):
    folder = german(tmp_path / "g", ["00600.ppm;1;2;9;10;2", "00601.ppm;1;2;9;10;1"], ["00600.jpg"])
    with pytest.raises(FileNotFoundError, match=r"gt.txt, line 2, is about .*00601.ppm, which is missing"):
        load_speed_limits(folder, "test")
    frame(folder / "00601.jpg", size=(8, 8))
    with pytest.raises(ValueError, match=r"00601.jpg is 8×8 but .*00600.jpg is 40×60 pixels"):
        load_speed_limits(folder, "test")
    frame(folder / "00601.jpg", size=(8, 2))
    with pytest.raises(
        ValueError, match=r"gt.txt, line 2: the speed-limit-30 with .* = 1, 2, 9, 10 is empty or not within"
    ):
        load_speed_limits(folder, "test")
    (folder / "00601.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(ValueError, match=r"00601.jpg is damaged, cut short or no image"):
        load_speed_limits(folder, "test")
    with pytest.raises(ValueError, match=r"too few train images of some class \(none: 0, 30: 0, 50: 0, 70: 0\)"):
        load_speed_limits(folder, "train")
    (folder / "gt.txt").write_bytes(b"\xff\xfe0\x000\x00")
    with pytest.raises(ValueError, match=r"gt.txt is not a text file of annotations"):
        load_speed_limits(folder, "test")
    folder = swedish(tmp_path / "s", {"a": GOOD, "b": swedish_sign("STOP")})
    with pytest.raises(FileNotFoundError, match=r"Set2/annotations.txt is missing"):
        load_speed_limits(folder, "test")
    (folder / "Set1" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations.txt, line 1, is about .*a.jpg, which is missing"):
        load_speed_limits(folder, "train")


def test_a_photograph_cut_short_names_itself(tmp_path):
    folder = german(tmp_path, [], ["00600.jpg", "00601.ppm"])
    for path in (folder / "00600.jpg", folder / "00601.ppm"):
        path.write_bytes(path.read_bytes()[:-40])
    data = load_speed_limits(folder, "test")
    for index, name in enumerate(("00600.jpg", "00601.ppm")):
        with pytest.raises(ValueError, match=rf"{name} is damaged, cut short or no image"):
            data.image(index)


@needs_german
def test_the_german_benchmark():
    """The number of frames of each class in each split, the duplicate left out; the whole set has as many of limits."""
    train, test = (load_speed_limits(REAL, split) for split in ("train", "test"))
    assert train.source == test.source == "GTSDB"
    assert train.class_counts.tolist() == [94, 46, 50, 23]
    assert test.class_counts.tolist() == [65, 31, 19, 29]
    assert train.image_size == test.image_size == (800, 1360)
    limits = (20, 30, 50, 60, 70, 80, 100, 120)
    train, test = (load_speed_limits(REAL, split, limits=limits) for split in ("train", "test"))
    assert train.class_counts.tolist()[1:] == [4, 46, 50, 16, 23, 24, 23, 28]
    assert test.class_counts.tolist()[1:] == [0, 31, 19, 6, 29, 8, 3, 5]  # 80: 00881 is 00613 again
    assert all(bool(example.targets) == bool(example.label) for example in train.examples + test.examples)
    assert train.image(0).float().std() > 20
