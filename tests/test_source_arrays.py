"""`ats.sources.from_arrays`: tensors, arrays, memory maps and whatever can be sliced."""

import pickle

import numpy as np
import pytest
import torch

from ats.sources import Box, from_arrays
from tests.written_images import assert_exact, boxes_of, pixels


def test_arrays_of_every_kind(tmp_path):
    values = pixels(40, 50, 3, np.uint16)
    np.save(tmp_path / "x.npy", values)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")

    class Sliced:  # as zarr and others are
        shape, dtype = values.shape, values.dtype

        def __getitem__(self, slices):
            return values[slices]

    chw = np.ascontiguousarray(values.transpose(2, 0, 1))
    small = np.ascontiguousarray(values[::2, ::2])
    for levels, last in (
        ([torch.from_numpy(chw), torch.from_numpy(chw)[:, ::2, ::2]], False),
        ([chw, chw[:, ::2, ::2]], False),
        ([chw.astype(">u2"), small.transpose(2, 0, 1)], False),
        ([chw[:, :, ::-1][:, :, ::-1]], False),
        ([mapped, mapped[::2, ::2]], True),
        (Sliced(), True),
    ):
        source = from_arrays(levels, channels_last=last)
        boxes = list(boxes_of(source))
        assert_exact(boxes, [source.read(*box[1:]) for box in boxes], [values, small])
    grey = from_arrays([values[..., 0]])
    assert_exact([Box(grey, 0, 3, 4, 5, 6)], [grey.read(0, 3, 4, 5, 6)], [values[..., :1]])


def test_a_box_of_an_array_is_a_copy():
    for array in (torch.zeros(1, 8, 8), np.zeros((1, 8, 8), np.float32)):
        from_arrays([array]).read(0, 0, 0, 8, 8).add_(1)
        assert array.sum() == 0


def test_memory_maps_pickle_as_places_in_files(tmp_path):
    """NumPy pickles a map as all of its pixels; slices of a map keep the offset of the whole."""
    values = pixels(300, 400)
    values.tofile(tmp_path / "raw")
    whole = np.memmap(tmp_path / "raw", np.uint8, "r", shape=values.shape)
    shifted = np.memmap(tmp_path / "raw", np.uint8, "r", offset=5000, shape=(50, 60, 3))
    for array, expected in (
        (whole, values),
        (whole[7:250:2, ::-1], values[7:250:2, ::-1]),
        (shifted[3:], values.reshape(-1)[5000:][: 50 * 60 * 3].reshape(50, 60, 3)[3:]),
    ):
        source = from_arrays([array], channels_last=True)
        data = pickle.dumps(source)
        assert len(data) < 2000
        for again in (pickle.loads(data), pickle.loads(pickle.dumps(pickle.loads(data)))):
            boxes = list(boxes_of(again))
            assert_exact(boxes, [again.read(*box[1:]) for box in boxes], [expected])
        assert again.fingerprint == source.fingerprint is not None
    changed = np.memmap(tmp_path / "raw", np.uint8, "c", shape=values.shape)
    changed[0, 0] = 7
    assert (
        pickle.loads(pickle.dumps(from_arrays([changed], channels_last=True))).read(0, 0, 0, 1, 1).tolist()
        == [[[7]]] * 3
    )


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        ([], ValueError, "at least one level"),
        ([np.zeros((3, 8, 8), np.int64)], TypeError, "level 0 is ndarray of int64, expected one of uint8, uint16"),
        (["x.tif"], TypeError, "level 0 is str of no dtype"),
        ([np.zeros(8, np.uint8)], ValueError, r"level 0 has the shape \(8,\)"),
        ([np.zeros((0, 8), np.uint8)], ValueError, r"shape \(0, 8\)"),
        ([np.zeros((64, 64, 3), np.uint8)], ValueError, "reads as 64 channels of 64×3 pixels; pass channels_last=True"),
        ([np.zeros((3, 8, 8), np.uint8), np.zeros((1, 4, 4), np.uint8)], ValueError, "must agree in channels"),
        ([np.zeros((4, 4), np.uint8), np.zeros((8, 8), np.uint8)], ValueError, "level 1 is 8×8 pixels, no smaller"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_image(levels, error, message):
    with pytest.raises(error, match=message):
        from_arrays(levels)
