"""Runs the tutorials' notebooks and keeps what they print and show: `make notebooks`.

A notebook is run from its first cell to its last, in a process and a folder of its own, and written with small pictures
and without what changes from run to run. `python -m tools.notebooks NAME…` runs those alone.
"""

import argparse
import base64
import io
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from ats._files import write_whole

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
SECONDS = 600  # that a cell may take
_COLOURS = 255  # of a picture as it is kept

Notebook = Any  # of nbformat, which knows no types


def executed(path: Path, folder: Path, environment: Mapping[str, str] | None = None) -> Notebook:
    """A notebook with the outputs of a run of it.

    Args:
        path: of the notebook, which stays as it is.
        folder: where it runs, and leaves its files.
        environment: of its process; this one's where None. The commands of this Python come first on its path.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    own = dict(os.environ if environment is None else environment)
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", "")])
    own |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "TQDM_DISABLE": "1"}
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, resources=where, coalesce_streams=True).execute(env=own)
    return notebook


def tidy(notebook: Notebook) -> Notebook:
    """Without what changes from run to run, and with pictures of few colours."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    count = 0
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = _small(data["image/png"])
                data.pop("text/plain", None)
            output.pop("metadata", None)
            if output.output_type in ("display_data", "execute_result"):
                output.metadata = {}
    return notebook


def pictures(notebook: Notebook) -> int:
    """How many pictures it shows."""
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def text(notebook: Notebook) -> str:
    """What it prints."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(
        output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
        for output in outputs
    )


def _small(picture: str) -> str:
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode() + "\n"


def main() -> int:
    """Run notebooks and write them back; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all of them where none is")
    chosen = parser.parse_args().names or names
    if unknown := sorted({*chosen} - {*names}):
        parser.error(f"there is no notebook {unknown[0]!r}, choose from {', '.join(names)}")
    failed = False
    for name in chosen:
        path, start = FOLDER / f"{name}.ipynb", time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                notebook = executed(path, Path(folder))
            except CellExecutionError as error:
                print(f"{path} failed and stays as it is:\n{error}", file=sys.stderr)
                failed = True
                continue
        write_whole(path, (nbformat.writes(tidy(notebook)) + "\n").encode())
        seconds, size = time.perf_counter() - start, path.stat().st_size / 1e3
        print(f"{path.name}: {seconds:.0f} s, {pictures(notebook)} pictures, {size:.0f} kB", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
