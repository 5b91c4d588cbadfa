"""What two processes do, each in a folder of its own as on two machines; torchrun starts it from test_two_ranks.py.

Each prints JSON, a line a finding, with its rank.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

import ats_kernels
from ats.experiments.training import train
from tests.faults import evaluated, tiny

RANK = int(os.environ["RANK"])


def tell(name: str, value: Any) -> None:
    """Print a finding whole: both processes write to one pipe."""
    os.write(1, (json.dumps({"rank": RANK, "name": name, "value": value}) + "\n").encode())


def attempt(name: str, config: Any) -> None:
    """Train, and tell the steps or the error."""
    try:
        train(config)
    except ValueError as error:
        tell(name, str(error))
        return
    summary = config.run_folder / "training.json"
    tell(name, json.loads(summary.read_text())["steps"] if summary.exists() else None)


def main(place: Path) -> None:
    """Train on two disks, evaluate, and draw."""
    here = place / f"machine-{RANK}"
    here.mkdir()
    os.chdir(here)
    config = tiny(Path("run"), devices="2", strategy="ddp")
    attempt("begun on two disks", config)
    attempt("complete on one of them", config)
    if RANK == 0:
        Path("run/training.json").unlink()
    attempt("checkpoint on one of them", config)
    torch.distributed.barrier()
    if RANK == 1:
        shutil.copytree(place / "machine-0" / "run", here / "run")
    torch.distributed.barrier()
    attempt("checkpoint on both", config)
    tell("evaluated", evaluated(2))

    L.seed_everything(0, workers=True, verbose=False)  # as Lightning's users do
    logits = torch.zeros(4, 1000)
    draws = [ats_kernels.sample(logits, 8)[0].tolist() for _ in range(2)]
    torch.manual_seed(0)
    tell("drawn", draws)
    tell("drawn again", [ats_kernels.sample(logits, 8)[0].tolist() for _ in range(2)])
    tell("drawn by a generator", ats_kernels.sample(logits, 8, generator=torch.Generator().manual_seed(3))[0].tolist())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
