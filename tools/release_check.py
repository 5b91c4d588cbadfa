"""Build what would be released, look into it, and install it into a fresh environment without the extras.

    make release-check

Nothing is published. The archives lie in dist/ afterwards. Needs `build` and `twine` (tools/release-requirements.txt).
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
IN_WHEEL = ("ats/", "ats_kernels/")
NEEDED = {
    "wheel": ("ats/__init__.py", "ats/py.typed", "ats_kernels/py.typed", "ats/datasets/mnist_digits/LICENSE"),
    "sdist": (
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        "docs/index.md",
        "tests/test_docs.py",
        "bench/__init__.py",
    ),
}
_DRAW = """
import ats, torch
assert ats.__version__ == {version!r}, ats.__version__
image = torch.randint(0, 256, (2, 3, 200, 200), dtype=torch.uint8)
logits = torch.zeros(2, 20, 20, requires_grad=True)
sample = ats.sample_patches(image, logits, n_patches=5, patch_size=16)
ats.pool(sample.patches.flatten(2).mean(2), sample).square().sum().backward()
assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
"""


class ReleaseError(Exception):
    """What stands against a release."""


def version() -> str:
    """Of the package, read without importing it."""
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "ats" / "version.py").read_text())
    if found is None:
        raise ReleaseError("ats/version.py has no __version__")
    return found[1]


def check_changelog(text: str, current: str) -> None:
    """Raise where the changelog has no dated section of this version, or something is not in it yet."""
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    if not any(re.match(rf"{re.escape(current)} - \d{{4}}-\d\d-\d\d\n", section) for section in sections):
        raise ReleaseError(f"CHANGELOG.md has no section '## {current} - YYYY-MM-DD'; date what is released")
    left = [section for section in sections if section.startswith("Unreleased\n") and section.split("\n", 1)[1].strip()]
    if left:
        raise ReleaseError(f"CHANGELOG.md has lines under Unreleased; move them to {current}, or raise the version")


def check_contents(kind: str, names: Iterable[str]) -> None:
    """Raise where an archive lacks a file that it needs, or has one that nobody asked for."""
    names = set(names)
    missing = [name for name in NEEDED[kind] if name not in names]
    if missing:
        raise ReleaseError(f"the {kind} lacks {', '.join(missing)}")
    odd = [name for name in names if "__pycache__" in name or name.startswith(("runs/", "site/", ".venv/"))]
    if kind == "wheel":
        odd += [name for name in names if not name.startswith(IN_WHEEL) and ".dist-info/" not in name]
    if odd:
        raise ReleaseError(f"the {kind} has {', '.join(sorted(odd)[:5])}")


def contents(archive: Path) -> dict[str, int]:
    """The files of a wheel or a source distribution, below its own folder, with their sizes."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {entry.filename: entry.file_size for entry in wheel.infolist() if not entry.is_dir()}
    with tarfile.open(archive) as sdist:
        return {entry.name.partition("/")[2]: entry.size for entry in sdist.getmembers() if entry.isfile()}


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def _build() -> dict[str, Path]:
    for old in ("dist", "build"):
        shutil.rmtree(ROOT / old, ignore_errors=True)
    _run(sys.executable, "-m", "build", "--outdir", ROOT / "dist")
    archives = {"sdist": next((ROOT / "dist").glob("*.tar.gz")), "wheel": next((ROOT / "dist").glob("*.whl"))}
    for kind, archive in archives.items():
        files = contents(archive)
        check_contents(kind, files)
        print(f"{archive.name}: {len(files)} files, {archive.stat().st_size / 1e6:.1f} MB", flush=True)
        for folder in sorted({name.partition("/")[0] for name in files}):
            inside = [size for name, size in files.items() if name.partition("/")[0] == folder]
            print(f"  {folder}: {len(inside)} files, {sum(inside) / 1e6:.2f} MB")
    _run(sys.executable, "-m", "twine", "check", "--strict", *archives.values())
    return archives


def _install(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        _run(sys.executable, "-m", "venv", environment)
        python = environment / "bin" / "python"
        _run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
        # From a folder of its own: the checkout's packages must not be what is imported.
        subprocess.run([python, "-c", _DRAW.format(version=version())], cwd=folder, check=True)
        said = subprocess.run(
            [environment / "bin" / "ats", "demo"], cwd=folder, capture_output=True, text=True, check=False
        )
        if "pip install 'torch-ats[experiments]'" not in said.stderr:
            raise ReleaseError(
                f"`ats demo` without the extra should say what to install, and says {said.stderr[-500:]!r}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, and say what stands against a release."""
    parser = argparse.ArgumentParser(prog="make release-check", description="Build, look into, install: no publishing.")
    parser.add_argument("--draft", action="store_true", help="let the changelog be without this version's date")
    options = parser.parse_args(arguments)
    try:
        if not options.draft:
            check_changelog((ROOT / "CHANGELOG.md").read_text(), version())
        archives = _build()
        _install(archives["wheel"])
    except (ReleaseError, subprocess.CalledProcessError) as error:
        print(f"release-check: {error}", file=sys.stderr)
        return 1
    print(f"torch-ats {version()} can be released")
    return 0


if __name__ == "__main__":
    sys.exit(main())
