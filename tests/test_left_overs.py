"""What killed processes leave is in nobody's way, and what commands write is written once."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ats import _files
from ats._files import read_object, unfinished, write_json, write_whole
from ats.datasets.synthetic.write import write_colon_cancer, write_german
from ats.experiments.commands import evaluate as evaluate_command
from ats.experiments.commands.command_line import run
from ats.experiments.training import train
from tests.faults import EVENTS, KILLED, forked, kill_in, tiny


@pytest.mark.parametrize("event", ["open", "write", "fsync", "folder"])
def test_a_kill_at_any_step_of_a_write_leaves_the_old_file_or_the_new(tmp_path: Path, event: str) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"step": 1})

    def work() -> None:
        kill_in(event, "a.json")
        write_json(path, {"step": 2})

    assert forked(work) == KILLED
    assert read_object(path, "step") == {"step": 2 if event == "folder" else 1}
    _files.remove_parts(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    assert {each for each, _ in EVENTS} == {"open", "write", "fsync", "folder"}


def _dead() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_images_that_a_killed_process_had_not_finished(tmp_path: Path) -> None:
    folder = tmp_path / "signs"
    host = unfinished(folder).name.split(".")[2]
    for name in (f".unfinished.{host}.{_dead()}", ".unfinished"):
        (folder / name).mkdir(parents=True)
        (folder / name / "SYNTHETIC.txt").write_text("half")
    write_german(folder, 2, 2, size=(60, 60), sign_size=(8, 12), limits=(30,))
    assert {path.suffix for path in folder.iterdir()} == {".jpg", ".txt"}
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_german(folder, 2, 2, size=(60, 60), sign_size=(8, 12), limits=(30,))
    busy = tmp_path / "busy"
    for name in (f".unfinished.{host}.{os.getppid()}", ".unfinished.elsewhere.1"):
        shutil.rmtree(busy, ignore_errors=True)
        (busy / name).mkdir(parents=True)
        with pytest.raises(FileExistsError, match="not an empty folder"):
            write_german(busy, 2, 2, size=(60, 60), sign_size=(8, 12), limits=(30,))
        assert (busy / name).is_dir()


def test_a_kill_as_images_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "tissue"

    def work() -> None:
        kill_in("write", "img2.png")
        write_colon_cancer(folder, 2, size=64)

    assert forked(work) == KILLED
    assert [path.name[:11] for path in folder.iterdir()] == [".unfinished"]
    write_colon_cancer(folder, 2, size=64)
    assert sorted(path.name for path in folder.iterdir()) == ["Classification", "SYNTHETIC.txt"]


def _write(path: Path, number: int, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait()
    try:
        write_whole(path, b"%d" % number * 1000, overwrite=False)
    except FileExistsError as error:
        sys.exit(3 if error.filename == str(path) else 4)


@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_writes_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    path = tmp_path / "new.json"
    if links:
        context = multiprocessing.get_context("fork")
        start = context.Barrier(4)
        processes = [context.Process(target=_write, args=(path, number, start)) for number in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        assert sorted(codes) == [0, 3, 3, 3]
        assert path.read_bytes() == b"%d" % codes.index(0) * 1000
    else:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
        write_whole(path, b"first", overwrite=False)
        with pytest.raises(FileExistsError):
            write_whole(path, b"second", overwrite=False)
        assert path.read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["new.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tmp_path_factory.mktemp("runs") / "a")).parent.parent


def test_ranks_evaluate_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchrun does: the same command in each process."""
    arguments = ["evaluate", str(trained), "--output", str(tmp_path / "found.json")]
    monkeypatch.setenv("RANK", "1")
    assert run(arguments) == 0
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "0")
    assert run(arguments) == 0
    assert [found["images"] for found in json.loads((tmp_path / "found.json").read_text())] == [2]
    assert run(arguments) == 1
    assert "is there already; name another file with --output" in capsys.readouterr().err


def test_a_file_that_came_meanwhile_is_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, real = tmp_path / "found.json", evaluate_command.evaluate

    def slow(*arguments: object, **options: object) -> object:
        path.write_text("another's")
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate_command, "evaluate", slow)
    assert run(["evaluate", str(trained), "--output", str(path)]) == 1
    assert "is there by now, of another command" in capsys.readouterr().err
    assert path.read_text() == "another's"


def test_sync_batchnorm_is_refused_on_a_cpu(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", sync_batchnorm=True)
    with pytest.raises(ValueError, match=r"trainer.sync_batchnorm is for GPUs, and this runs on the CPU; leave it out"):
        train(config)
    assert not (tmp_path / "run").exists()
