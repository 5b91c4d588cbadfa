"""Files of runs that are damaged, foreign or hostile: a line that names the file, and advice that works."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ats.experiments.checkpoints import read_checkpoint, write_checkpoint
from ats.experiments.config import ExperimentConfig, to_dict
from ats.experiments.registry import from_dict
from ats.experiments.trained import load
from ats.experiments.training import train
from tests.faults import equal, stopped_copy, tiny, trained


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> ExperimentConfig:
    return stopped_copy(whole, tmp_path)


def ascii_start(text: str) -> str:
    return ascii(text[:9])


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def bracketed(path: Path) -> None:
    path.write_text("[" * 100_000)


def foreign(path: Path) -> None:
    torch.save({"model": torch.ones(3)}, path)


def hostile(path: Path) -> None:
    torch.save({"state_dict": Payload()}, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"0" * 1_000_000)


def without(name: str) -> Any:
    def change(path: Path) -> None:
        content = read_checkpoint(path)
        del content[name]
        write_checkpoint(path, content)

    return change


def changed(name: str, value: Any) -> Any:
    def change(path: Path) -> None:
        write_checkpoint(path, read_checkpoint(path) | {name: value})

    return change


def resized(path: Path) -> None:
    content = read_checkpoint(path)
    content["state_dict"]["model.head.weight"] = torch.ones(2, 2)
    write_checkpoint(path, content)


DAMAGE = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "cut": (cut, "is cut short"),
    "text": (lambda path: path.write_text("weights"), "is cut short, or no checkpoint"),
    "brackets": (bracketed, "is cut short, or no checkpoint"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({})), "is cut short, or no checkpoint"),
    "foreign": (foreign, "is no checkpoint that `ats train` wrote"),
    "hostile": (hostile, "holds more than numbers and texts"),
    "compressed": (compressed, "is no checkpoint that `ats train` wrote"),
    "a list": (lambda path: torch.save([1], path), "is no checkpoint that `ats train` wrote"),
    "no optimiser": (without("optimizer_states"), "it has no 'optimizer_states'"),
    "loops of another kind": (changed("loops", {"fit_loop": 3}), "is damaged, or was written by another version"),
    "optimiser of another kind": (changed("optimizer_states", [3]), "is damaged, or was written by another version"),
    "another model": (resized, "'model.head.weight' does not fit"),
    "no options": (without("hyper_parameters"), "was written by another version of ats"),
    "options of another kind": (changed("hyper_parameters", {"config": []}), "was written by another version of ats"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_following_the_advice_works(
    name: str, copy: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, text = DAMAGE[name]
    last = copy.run_folder / "checkpoints" / "last.ckpt"
    damage(last)
    with pytest.raises(ValueError, match="remove it to begin anew") as caught:
        train(copy)
    message = str(caught.value)
    assert message.startswith(f"{last} {text}") or text in message
    assert str(last) in message
    assert "weights_only" not in message
    assert not (tmp_path / "ran").exists()
    if name in ("empty", "cut", "text", "foreign", "hostile", "no options", "another model"):
        with pytest.raises(ValueError, match=r"last\.ckpt") as caught:
            load(last)
        assert "weights_only" not in str(caught.value)
    if name == "empty":
        last.unlink()
        assert train(copy) == last


def test_any_flipped_byte_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "small.ckpt"
    content = {"weight": torch.arange(6.0), "step": 3}
    write_checkpoint(path, content)
    data = path.read_bytes()
    noticed = 0
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            found = read_checkpoint(path)
        except ValueError as error:
            found, noticed = content, noticed + str(error).startswith(f"{path} ")
        assert equal(found, content), place
    assert noticed > 50


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "0"},
        {"seed": 1.5},
        {"optim": []},
        {"optim": {"epochs": True}},
        {"optim": {"learning_rate": "fast"}},
        {"model": {"method": "magic"}},
        {"data": 5},
        {"output": 7},
    ],
    ids=str,
)
def test_options_of_wrong_types_are_refused(change: dict[str, Any]) -> None:
    values = to_dict(tiny(Path("run")))
    for name, value in change.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=r"not a configuration of this version|must be"):
        from_dict(values)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, '{"seed": []}', "\udcff"], ids=ascii_start)
def test_a_damaged_config_is_named(copy: ExperimentConfig, text: str) -> None:
    path = copy.run_folder / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json cannot be read .*--output") as caught:
        train(copy)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500
