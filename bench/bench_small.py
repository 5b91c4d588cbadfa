"""Small problems on one thread of a CPU: ours with and without compiled loops, plain PyTorch, and an earlier commit.

    python -m bench.bench_small                                   # a table of ratios to plain PyTorch
    python -m bench.bench_small --against ../earlier --cells 1500 --batch 1

Each checkout has a process of its own, which times a few calls when it is asked to; all methods of a row take turns,
every round in another order, and the quickest round counts (`--median`: the median). ``--against`` names the folder of
another checkout of this project.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = {
    "draw": "draw, forward",
    "draw-backward": "draw, with backward",
    "chain": "draw, gather and pool, with backward",
    "ordered": "pool, with backward",
    "unordered": "pool unordered, with backward",
    "control": "pool unordered with control variate, with backward",
}
GRIDS = {400: (20, 20), 1_500: (30, 50), 2_500: (50, 50), 10_000: (100, 100), 32_400: (180, 180), 262_144: (512, 512)}
BATCHES = (1, 16)
DRAWS, FEATURES, SIDE, PATCH = 10, 32, 500, 27
HERE = Path(__file__).resolve().parents[1]
BURST = 2e-3  # seconds that are timed together
FIRST = """
import time, torch
torch.set_num_threads(1)
import ats, ats_kernels
logits, features = torch.zeros(1, 1500, requires_grad=True), torch.zeros(1, 10, 32, requires_grad=True)
start = time.perf_counter()
draw = ats_kernels.sample(logits, 10)
ats.expectation(features, draw.log_attention, estimator="unordered", control_variate=True).sum().backward()
print(time.perf_counter() - start)
"""


def methods(task: str, batch: int, cells: int) -> dict[str, Callable[[], Any]]:
    """A call of each: "ats", by the backend that is set, and "plain"."""
    import torch
    import torch.nn.functional as F

    import ats
    import ats_kernels

    torch.manual_seed(0)
    grid = GRIDS[cells]
    maps = torch.randn(batch, *grid)
    logits = maps.flatten(1).clone()
    features = torch.randn(batch, DRAWS, FEATURES, requires_grad=True)
    later = torch.arange(DRAWS - 1, -1, -1)

    def plain_draw(z: Any) -> tuple[Any, ...]:
        log_attention = z.log_softmax(-1)
        drawn = torch.multinomial(log_attention.detach().exp(), DRAWS)
        return drawn, log_attention.gather(1, drawn)

    def plain_pool(features: Any, log_attention: Any) -> Any:
        attention = log_attention.detach().exp()
        weights = (1 - (attention.cumsum(-1) - attention) + later * attention) / DRAWS
        terms = features + features.detach() * (log_attention - log_attention.detach()).unsqueeze(-1)
        return torch.einsum("bn,bnd->bd", weights, terms)

    def plain_gather(image: Any, cells: Any) -> Any:
        side = torch.arange(PATCH)
        rows = (cells // grid[1] * (SIDE - PATCH) // grid[0]).unsqueeze(-1) + side
        columns = (cells % grid[1] * (SIDE - PATCH) // grid[1]).unsqueeze(-1) + side
        which = torch.arange(batch).view(-1, 1, 1, 1)
        return image[which, :, rows.unsqueeze(-1), columns.unsqueeze(-2)].movedim(-1, 2) / 255

    if task == "draw":
        return {"ats": lambda: ats_kernels.sample(logits, DRAWS), "plain": lambda: plain_draw(logits)}
    if task == "draw-backward":
        logits.requires_grad_()
        return {
            "ats": lambda: torch.autograd.grad(ats_kernels.sample(logits, DRAWS).log_attention.sum(), logits),
            "plain": lambda: torch.autograd.grad(plain_draw(logits)[1].sum(), logits),
        }
    if task == "chain":
        image = torch.randint(256, (batch, 1, SIDE, SIDE), dtype=torch.uint8)
        maps.requires_grad_()

        def chain() -> Any:
            sample = ats.sample_patches(image, maps, DRAWS, PATCH)
            pooled = ats.expectation(features, sample.log_attention)
            return torch.autograd.grad(pooled.sum(), [maps, features])

        def plain() -> Any:
            drawn, log_attention = plain_draw(maps.flatten(1))
            plain_gather(image, drawn)
            return torch.autograd.grad(plain_pool(features, log_attention).sum(), [maps, features])

        return {"ats": chain, "plain": plain}
    options = {"ordered": {}, "unordered": {"estimator": "unordered"}}
    options["control"] = {"estimator": "unordered", "control_variate": True}
    log_attention = F.log_softmax(logits, -1)[:, :DRAWS].clone().requires_grad_()
    leaves = [features, log_attention]
    return {
        "ats": lambda: torch.autograd.grad(ats.expectation(*leaves, **options[task]).sum(), leaves),
        "plain": lambda: torch.autograd.grad(plain_pool(*leaves).sum(), leaves),
    }


def work() -> None:
    """Answer lines of [task, batch, cells, method, backend, calls] with the seconds that a call took."""
    import torch

    torch.set_num_threads(1)
    made: tuple[Any, dict[str, Callable[[], Any]]] = None, {}
    for line in sys.stdin:
        task, batch, cells, method, backend, calls = json.loads(line)
        if made[0] != (task, batch, cells):
            made = (task, batch, cells), methods(task, batch, cells)
        os.environ["ATS_BACKEND"] = backend
        call = made[1][method]
        call()  # what another method left in the caches
        start = time.perf_counter()
        for _ in range(calls):
            call()
        print((time.perf_counter() - start) / calls, flush=True)


class Worker:
    """A process that imports the project from a folder, one thread."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--work"],
            env=environment(folder),
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, *request: Any) -> float:
        """A call's."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit("a worker stopped; what it printed is above")
        return float(answer)

    def close(self) -> None:
        self._process.communicate()


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **more}


def first_calls(has_numba: bool) -> list[str]:
    """What the first draw and pooling of a process take beyond the import."""
    lines = ["First draw and pooling of a process, forward and backward:", ""]
    runs = {"without loops": {"ATS_BACKEND": "cpu"}}
    with tempfile.TemporaryDirectory() as folder:
        if has_numba:
            runs["loops, compiled"] = runs["loops, from the disk"] = {
                "ATS_BACKEND": "numba",
                "NUMBA_CACHE_DIR": folder,
            }
        for name, variables in runs.items():
            command = [sys.executable, "-c", FIRST]
            run = subprocess.run(
                command, env=environment(HERE, **variables), capture_output=True, text=True, check=True
            )
            lines.append(f"- {name}: {float(run.stdout):.2f} s")
    return [*lines, ""]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the folder of another checkout")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--cells", nargs="+", type=int, choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--median", action="store_true", help="of the rounds, in place of the quickest")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    if arguments.against and not (arguments.against / "ats_kernels").is_dir():
        parser.error(f"--against {arguments.against} is no checkout: it has no folder ats_kernels")
    has_numba = subprocess.run([sys.executable, "-c", "import numba"], capture_output=True).returncode == 0
    print("\n".join(first_calls(has_numba)), flush=True)

    here = Worker(HERE)
    columns = {"plain PyTorch": (here, "plain", "cpu"), "ours": (here, "ats", "cpu")}
    if has_numba:
        columns["ours, numba"] = here, "ats", "numba"
    if arguments.against:
        columns["earlier"] = Worker(arguments.against.resolve()), "ats", ""
    others = list(columns)[1:]
    print("| | B | K | plain PyTorch, µs |", " | ".join(f"{name}, µs | ×" for name in others), "|")
    print("| --- " * (4 + 2 * len(others)) + "|", flush=True)
    best = statistics.median if arguments.median else min
    for task in arguments.tasks:
        pools = task in ("ordered", "unordered", "control")
        for batch in arguments.batch:
            for cells in arguments.cells[:1] if pools else arguments.cells:
                times: dict[str, list[float]] = {name: [] for name in columns}
                plans = {}
                for name, (worker, method, backend) in columns.items():
                    worker.seconds(task, batch, cells, method, backend, 3)
                    once = worker.seconds(task, batch, cells, method, backend, 3)
                    plans[name] = max(1, min(100, round(BURST / once)))
                names = list(columns)
                for number in range(arguments.rounds):
                    turn = number % len(names)
                    for name in names[turn:] + names[:turn]:
                        worker, method, backend = columns[name]
                        times[name].append(worker.seconds(task, batch, cells, method, backend, plans[name]))
                plain = best(times["plain PyTorch"])
                row = " | ".join(f"{1e6 * best(times[name]):.0f} | {best(times[name]) / plain:.2f}" for name in others)
                size = "any" if pools else f"{cells:,}"
                print(f"| {TASKS[task]} | {batch} | {size} | {1e6 * plain:.0f} | {row} |", flush=True)
    for worker in {id(column[0]): column[0] for column in columns.values()}.values():
        worker.close()


if __name__ == "__main__":
    main()
