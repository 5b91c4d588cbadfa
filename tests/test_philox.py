"""`ats_kernels.philox`: the published generator, whichever way its numbers are made."""

import numpy as np
import torch
from torch.testing import assert_close

from ats_kernels import philox


def test_philox_known_answers():
    """The vectors published with Random123: draws must not change with the library's version."""
    for counter, key, words in [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]:
        output = philox.philox4x32(torch.tensor(counter).unbind(), torch.tensor(key).unbind())
        assert torch.stack(output).tolist() == words


def test_paired_random_numbers():
    seed = torch.tensor(2**62 + 12345)
    row = torch.arange(3).unsqueeze(-1)
    expected = philox.random_bits(seed, torch.arange(14), row, philox.CELLS)
    paired = philox.paired_bits(int(seed), np.arange(7), row.numpy(), philox.CELLS)
    assert torch.equal(torch.from_numpy(paired), expected)
    assert_close(torch.from_numpy(philox.log_exponential_numpy(paired)), philox.log_exponential(expected))
    assert expected.min() >= 0
    assert expected.max() < 2**53
    assert len(expected.unique()) == 3 * 14


def test_kept_counters():
    """The numbers of a call are those of its seed and counters, whatever the arrays were used for before."""
    counters = philox.Counters(np.arange(5), 2, philox.BLOCKS)
    exponentials = np.empty((5, 2))
    for seed, start in ((7, 0), (2**63 - 1, 0), (2**40, 100)):
        counters.number(np.arange(start, start + 5))
        expected = philox.random_bits(
            torch.tensor(seed), torch.arange(2 * start, 2 * start + 10), torch.tensor(2), philox.BLOCKS
        )
        assert torch.equal(torch.from_numpy(counters.bits(seed).T.astype(np.int64)).flatten(), expected)
        counters.negative_exponentials(seed, exponentials)

        negative = torch.log1p(-philox.uniform(expected))
        assert_close(torch.from_numpy(exponentials).flatten(), negative, rtol=1e-15, atol=0)
