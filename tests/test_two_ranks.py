"""Two processes by torchrun, on two disks: they agree from where to go on, count each image once, and draw apart."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest
import torch

import ats_kernels
from ats.experiments.samplers import EachOnce, read_and_counted
from tests.faults import evaluated


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Any]]:
    """What the two processes tell, by name and rank."""
    place = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "tests.two_ranks", str(place)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, dict[int, Any]] = defaultdict(dict)
    for line in done.stdout.splitlines():
        if line.startswith('{"rank"'):
            finding = json.loads(line)
            told[finding["name"]][finding["rank"]] = finding["value"]
    return told


def test_ranks_on_two_disks_go_on_together_or_not_at_all(found: dict[str, dict[int, Any]]) -> None:
    """Eight images in batches of four on two devices are a step an epoch. One rank's epoch 1 beside another's 0 would
    end without an error."""
    assert found["begun on two disks"] == {0: 2, 1: None}
    assert found["complete on one of them"] == {0: 2, 1: None}
    refusals = found["checkpoint on one of them"]
    assert refusals[0] == refusals[1]
    assert "rank 1 sees another run than rank 0: checkpoints/last.ckpt differ. Share one disk, or copy" in refusals[0]
    assert found["checkpoint on both"][0] == 2


def test_each_image_counts_once_on_two_devices(found: dict[str, dict[int, Any]]) -> None:
    """Five images, of which one device has three batches and the other two: what one device finds of them."""
    both = found["evaluated"]
    assert both[0] == both[1]
    assert set(both[0]) == {"validation/loss", "validation/error", "test/loss", "test/error"}
    assert both[0] == pytest.approx(evaluated(1), rel=1e-5)


def test_ranks_draw_apart_by_default_and_alike_by_a_generator(found: dict[str, dict[int, Any]]) -> None:
    drawn, again, given = found["drawn"], found["drawn again"], found["drawn by a generator"]
    assert drawn == again
    assert drawn[0] != drawn[1]
    assert all(left != right for left, right in zip(*drawn[0], strict=True))
    assert given[0] == given[1]
    torch.manual_seed(0)
    alone = [ats_kernels.sample(torch.zeros(4, 1000), 8)[0].tolist() for _ in range(2)]
    assert drawn[0] == alone, "rank 0 draws as a process alone does"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_are_equally_long_and_count_each_index_once(count: int, processes: int) -> None:
    counted = []
    for rank in range(processes):
        share = EachOnce(count, processes, rank)
        indices, counts = read_and_counted(torch.tensor(list(share)))
        assert len(indices) == len(share) == -(-count // processes)
        assert bool(((indices >= 0) & (indices < count)).all())
        counted += indices[counts].tolist()
    assert sorted(counted) == list(range(count))
