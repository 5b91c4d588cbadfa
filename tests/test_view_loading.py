"""Views that workers read beforehand: the same batches, draws and weights, however many, and files named in errors."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ats.experiments.images import ImagesData
from ats.experiments.training import train
from ats.experiments.view_loading import ViewBatch, as_batch
from tests.test_images_experiment import TWO, data_of, tiny
from tests.test_images_on_disk import unequal
from tests.test_training import assert_same, weights

SPLITS = ["train"] * 8 + ["validation"] * 2 + ["test"] * 2


def test_a_training_is_the_same_with_and_without_workers(tmp_path: Path) -> None:
    """Two epochs with images changed at random and images for validation; with a cache, and reading anew."""
    manifest = unequal(tmp_path, {"split": SPLITS})
    found = []
    for workers, cache in ((0, None), (2, None), (2, tmp_path / "views")):
        config = tiny(manifest, tmp_path / f"run-{len(found)}", 2, storage="disk", workers=workers, cache=cache)
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, keep="best"))
        found.append(train(config))
    for other in found[1:]:
        assert_same(weights(found[0]), weights(other))
    assert len(list((tmp_path / "views").iterdir())) == 12


def read(data: ImagesData, **how: object) -> list[ViewBatch]:
    loader = DataLoader(data.store("train").reader(), batch_size=3, collate_fn=as_batch, **how)  # type: ignore
    return list(loader)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_batches_are_the_same_from_every_kind_of_worker(tmp_path: Path, context: str) -> None:
    data = data_of(tiny(unequal(tmp_path, {"split": SPLITS}), tmp_path / "run", storage="disk"))
    here = read(data)
    workers = read(data, num_workers=2, multiprocessing_context=context)
    assert [batch.indices.tolist() for batch in workers] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    for one, other in zip(here, workers, strict=True):
        for mine, theirs in zip(one.views, other.views, strict=True):
            assert isinstance(mine, Tensor)
            assert torch.equal(mine, theirs)  # type: ignore[arg-type]
    view, _, _ = data.load("train", torch.arange(3), epoch=1)
    data.store("train").given = here[0].by_image()
    given, _, _ = data.load("train", torch.arange(3), epoch=1)
    for mine, theirs in zip(view, given, strict=True):
        assert torch.equal(mine, theirs)


def test_images_that_are_not_counted_keep_their_mark(tmp_path: Path) -> None:
    data = data_of(tiny(unequal(tmp_path, {"split": SPLITS}), tmp_path / "run", storage="disk"))
    reader = data.store("train").reader()
    batch = as_batch([reader[2], reader[~5]])
    assert batch.indices.tolist() == [2, -6]
    assert batch.by_image().keys() == {2, 5}
    assert torch.equal(batch.by_image()[5], reader[5][1])  # type: ignore[arg-type]


class Remove(Callback):
    """A file that goes away between the check of the data and the first step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_start(self, *_: object) -> None:
        self.path.unlink()


def test_a_file_that_a_worker_cannot_read_is_named_on_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ats.sources.plain.KEPT_BYTES", 1)  # else the decoded image is still there
    manifest = unequal(tmp_path, {"split": SPLITS})
    config = tiny(manifest, tmp_path / "run", 1, storage="disk", workers=1)
    with pytest.raises(ValueError, match=rf"^{manifest}, line 5: \S*3\.png ") as caught:
        train(config, callbacks=(Remove(tmp_path / "3.png"),))
    assert "\n" not in str(caught.value)


def test_grey_images_on_disk_are_colours_too(tmp_path: Path) -> None:
    manifest = unequal(tmp_path, {"split": SPLITS})
    grey = np.array(Image.open(tmp_path / "4.png").convert("L"))
    Image.fromarray(grey).save(tmp_path / "4.png")
    memory, disk = (
        data_of(tiny(manifest, tmp_path / "run", storage=storage, cache=tmp_path / "views"))
        for storage in ("memory", "disk")
    )
    (view, image, _), (far_view, (far,), _) = (each.load("train", torch.tensor([4])) for each in (memory, disk))
    torch.testing.assert_close(view, far_view)
    assert torch.equal(image[0], far.read(0, 0, 0, *grey.shape))
    assert far.channels == 3
    assert TWO[4] == "red"
