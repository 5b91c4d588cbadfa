"""`import ats` imports what is asked for, and the command line helps without waiting for PyTorch."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ats
from ats.experiments.commands.command_line import COMMANDS, run


def imported_for_type_checkers() -> dict[str, str]:
    """The names that ats/__init__.py shows to type checkers, with their modules."""
    tree = ast.parse(Path(ats.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    found = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in found for alias in node.names if alias.name != "TrainedModel"}


def test_types_and_names_agree() -> None:
    assert imported_for_type_checkers() == ats._HOMES
    assert {*ats._HOMES, "load", "__version__"} == set(ats.__all__)


@pytest.mark.parametrize("name", sorted(ats.__all__))
def test_every_name_is_there(name: str) -> None:
    assert name in dir(ats)
    value = getattr(ats, name)
    # A submodule of a function's name would take its place once it is imported.
    assert isinstance(value, ModuleType) == (ats._HOMES.get(name) == "ats")
    assert isinstance(value, ModuleType) or name not in {module.name for module in pkgutil.iter_modules(ats.__path__)}


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'ats' has no attribute 'sample_patch'"):
        _ = ats.sample_patch  # type: ignore[attr-defined]


def test_help_and_version_import_no_torch() -> None:
    script = (
        "import sys\n"
        "from ats.cli import main\n"
        "for arguments in (['--help'], ['--version'], ['nonsense']):\n"
        "    sys.argv = ['ats', *arguments]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as stop:\n"
        "        print(stop.code)\n"
        "print(sorted({'torch', 'numpy', 'lightning', 'tyro', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert lines[-4:] == [ats.__version__, "0", "2", "[]"]
    assert "unknown command 'nonsense', expected one of train, " in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As of `ats --help | head -1`."""
    script = "import sys; from ats.cli import main; sys.argv = ['ats', '--help']; main()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_is_where_the_table_says(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert f"ats {command}" in capsys.readouterr().out
