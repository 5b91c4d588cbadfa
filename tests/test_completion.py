"""What a shell completes, as bash itself answers."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ats.experiments.commands.command_line import COMMANDS
from ats.experiments.commands.completion import script

_ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_ats
echo "${COMPREPLY[*]}"
"""


@pytest.fixture(scope="module")
def completion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shell") / "ats.sh"
    path.write_text(script())
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="NOT RUN: there is no bash here")
@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("ats ev", "evaluate"),
        ("ats ", " ".join(COMMANDS)),
        ("ats train co", "colon-cancer"),
        ("ats study i", "inference"),
        ("ats train images --model.meth", "--model.method"),
        ("ats train images --model.method g", "gated-mil"),
        ("ats train megapixel-mnist --model.estimator ", "ordered unordered"),
        ("ats evaluate runs/a --method to", "topk"),
        ("ats evaluate runs/a --output fi", ""),  # a file, which the shell completes by itself
        ("ats demo --se", "--seed"),
    ],
)
def test_bash_completes(completion: Path, line: str, answer: str) -> None:
    done = subprocess.run(
        ["bash", "-c", _ASK, "bash", str(completion), *line.split(" ")],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == answer
