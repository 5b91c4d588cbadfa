"""The GPU check rehearsed whole on the CPU, with nothing but the packages it may need; then killed at many moments."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ats.experiments.markdown import wrap
from bench.render import markdown, write_page
from tests.helpers import alone
from tests.rehearsed_check import MOVES, PLACES, WRITES
from tests.test_gpu_check import ORDER
from tests.test_gpu_check_needs import without_other_packages
from tools.gpu_check.no_sanitizer import watched
from tools.gpu_check.parts import ROOT, Setting, parts
from tools.gpu_check.processes import Command

FIRST_LINE = "# Rehearsal without a GPU, on "
FILES = {f"{name}.log" for name in ("-tests", "-sanitizers", "-bench", "-training")} | {".json", ".md"}


def rehearse(what: str, folder: Path, **more: str) -> str:
    command = [sys.executable, "-m", "tests.rehearsed_check", what, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=alone(**more), capture_output=True, text=True, check=False)
    logs = "".join(path.read_text()[-3000:] for path in folder.glob("whole-*.log")) if done.returncode else ""
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return done.stdout


def rehearsed_in(place: Path) -> Path:
    """A folder with a rehearsal in which every part has run."""
    folder, blocked = place / "rehearsed", place / "site"
    folder.mkdir()
    blocked.mkdir()
    site = without_other_packages(blocked)
    rehearse("whole", folder, PYTHONPATH=f"{site}{os.pathsep}{ROOT}")
    return folder


def kill(rehearsed: Path) -> dict[str, int]:
    """Exit statuses by the moment at which a rehearsal was killed."""
    return {line["moment"]: line["status"] for line in map(json.loads, rehearse("killed", rehearsed).splitlines())}


def read(stem: Path) -> tuple[dict[str, Any], str]:
    """A report that is whole: JSON with all parts, and a page that names each."""
    record, text = json.loads(Path(f"{stem}.json").read_text()), Path(f"{stem}.md").read_text()
    assert [part["name"] for part in record["parts"]] == ORDER
    assert text.startswith(FIRST_LINE)
    assert "no figure here is a GPU's" in text.partition("\n")[0]
    for part in record["parts"]:
        assert f"| {part['title']} | " in text
    assert record["finished"] or "**Not whole:** the check is under way, or was killed." in text
    return record, text


def test_the_check_rehearsed_whole_and_killed_at_any_moment(tmp_path: Path) -> None:
    """One test, for one process runs it: the rehearsal takes a minute or two."""
    rehearsed = rehearsed_in(tmp_path)
    every_part_has_run_and_says_what_it_cannot_show(rehearsed)
    killed = kill(rehearsed)
    for moment in (*PLACES, *WRITES, *MOVES):
        what_is_left_is_a_whole_report(killed, moment, rehearsed)
    a_rehearsal_is_whole_where_nothing_kills_it(killed, rehearsed)


def every_part_has_run_and_says_what_it_cannot_show(rehearsed: Path) -> None:
    record, text = read(rehearsed / "whole")
    assert [part["status"] for part in record["parts"]] == ["passed"] * 8, text
    assert all(part["lacks"].startswith("Rehearsed ") for part in record["parts"])
    assert all(" ".join(part["lacks"].split()) in " ".join(text.split()) for part in record["parts"])
    found = {part["name"]: part["summary"] for part in record["parts"]}
    assert found["memcheck"] == found["racecheck"] == found["synccheck"] == "1 passed, 0 failed, 0 skipped"
    assert found["tests"].endswith(" passed, 0 failed, 0 skipped")
    assert "digits: the bundled ones" in found["training"]
    assert "test error" in found["training"]
    assert record["bytes_per_second"] > 0
    assert len({group["section"] for group in record["groups"]}) >= 5
    floors = [target for group in record["groups"] for target in group["targets"] if "copy's rate" in target["what"]]
    assert floors, "what is measured against a GPU's floors has run"
    assert "lightning is not installed" in text
    assert {path.name.removeprefix("whole") for path in rehearsed.glob("whole*")} == FILES
    logs = {name: (rehearsed / f"whole-{name}.log").read_text() for name in ("tests", "sanitizers", "bench")}
    assert "passed tests/test_sample_triton.py::" in logs["tests"]
    assert logs["sanitizers"].count("tools.gpu_check.no_sanitizer --tool=") == 3
    assert "bench/bench_tables.py ." in logs["bench"]


def what_is_left_is_a_whole_report(killed: dict[str, int], moment: str, rehearsed: Path) -> None:
    folder = rehearsed / moment.replace(" ", "-")
    assert killed[moment] == -9, moment
    assert len([path for path in folder.iterdir() if path.is_file()]) <= (8 if moment not in MOVES else 14)
    if moment == PLACES[0]:  # before there is anything to say
        assert not list(folder.glob("killed*"))
        return
    stem = folder / "killed"
    if moment == WRITES[0]:  # the first page: it can be made of the JSON
        assert not stem.with_suffix(".md").exists()
        write_page(stem.with_suffix(".json"))
    record, text = read(stem)
    if moment in MOVES:  # the former report, or the new
        assert record["finished"]
        return
    statuses = [part["status"] for part in record["parts"]]
    done = statuses.count("passed")
    assert statuses == (["passed"] * done + ["running"] * (statuses.count("running")) + ["not run"] * 8)[:8]
    for part in record["parts"][done + statuses.count("running") :]:
        assert part["summary"] == "its turn has not come"
        outcome = "**not run**" if part["failed"] else "not run"  # the check fails without its tests
        assert f"| {part['title']} | {outcome} | its turn has not come |" in text
    assert not record["finished"]
    if moment in PLACES:
        assert text == wrap(markdown(record))
        assert done == max(0, int(float(moment.split()[1]) // 10) - 1)
        assert "running" in statuses


def a_rehearsal_is_whole_where_nothing_kills_it(killed: dict[str, int], rehearsed: Path) -> None:
    assert killed["never at 1e9"] == 0
    record, _ = read(rehearsed / "never-at-1e9" / "killed")
    assert record["finished"]
    whole, _ = read(rehearsed / "whole")
    assert [part["summary"] for part in record["parts"]] == [part["summary"] for part in whole["parts"]]


def test_a_rehearsal_has_the_commands_of_a_gpu(tmp_path: Path) -> None:
    """But for the sanitizer, sizes, and the device."""
    on_gpu = parts(Setting(cores=2, sanitizer="/usr/bin/compute-sanitizer", bytes_per_second=4.3e12))
    rehearsal = parts(Setting("all", cores=2, sanitizer=None, bytes_per_second=4.3e12))
    for ours, theirs in zip(rehearsal, on_gpu, strict=True):
        assert (ours.name, ours.share, ours.most, ours.required) == (
            theirs.name, theirs.share, theirs.most, theirs.required
        )  # fmt: skip
        words, of_gpu = (set(_words(part.commands(tmp_path, 100.0))) for part in (ours, theirs))
        more = {word.partition("=")[0] for word in words - of_gpu}
        less = {word.partition("=")[0] for word in of_gpu - words}
        assert more <= {"--few", "--device", "--rehearse", "--images", "--image-size", "--seconds", *_STAND_IN}
        assert less <= {"--few", "--device", "--seconds", "/usr/bin/compute-sanitizer"}


_STAND_IN = {sys.executable, "-m", "tools.gpu_check.no_sanitizer"}


def _words(commands: list[Command] | str) -> list[str]:
    assert not isinstance(commands, str), commands
    return [word for command in commands for word in command.arguments]


def test_the_stand_in_for_the_sanitizer_refuses_what_that_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tool=memcheck", "--report-api-errors=no", "--error-exitcode=99"]
    assert watched([*options, "python", "-m", "pytest", "--tool=x"]) == ["python", "-m", "pytest", "--tool=x"]
    for wrong in (["--tool=memchek", *options[1:], "python"], [*options, "--leak"], options):
        with pytest.raises(SystemExit):
            watched(wrong)
    assert "invalid choice: 'memchek'" in capsys.readouterr().err
