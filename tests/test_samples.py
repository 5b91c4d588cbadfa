"""What a sample is good for: it is kept, moved, cut, joined, written and traced without losing how it was drawn."""

import copy
import csv
import dataclasses
import io
import pickle
from pathlib import Path

import lightning
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory

import ats
from ats.samples import PatchTable
from tests.helpers import assert_close, randn, seeded

IMAGE = torch.rand(3, 2, 24, 30, generator=seeded(5))
LOGITS = randn(3, 4, 6, dtype=torch.float32)


def draw(requires_grad: bool = False, **options: object) -> ats.PatchSample:
    logits = LOGITS.clone().requires_grad_(requires_grad)
    return ats.sample_patches(IMAGE, logits, 5, (4, 7), generator=seeded(), **options)  # type: ignore[arg-type]


def masked(**options: object) -> ats.PatchSample:
    """Image 1 has two live cells, fewer than the five draws."""
    mask = torch.ones(3, 4, 6, dtype=torch.bool)
    mask[1] = False
    mask[1, 2, 1:3] = True
    return draw(mask=mask, **options)


def same(got: ats.CellSample, want: ats.CellSample) -> bool:
    assert type(got) is type(want)
    for field in dataclasses.fields(want):
        left, right = getattr(got, field.name), getattr(want, field.name)
        if not (torch.equal(left, right) if isinstance(right, Tensor) else left == right):
            return False
    return True


def test_it_knows_how_it_was_drawn() -> None:
    sample = draw(replace=True)
    assert (sample.replace, sample.selection, sample.grid_size, sample.patch_size) == (True, "sample", (4, 6), (4, 7))
    assert not sample.padded
    assert draw(selection="topk").selection == "topk"
    assert masked().padded
    assert repr(masked()) == (
        "PatchSample(images=3, n=5, replace=False, selection='sample', grid_size=(4, 6), padded=True, "
        "patch_size=(4, 7))"
    )


def test_drawing_and_reading_come_apart() -> None:
    """`sample_patches` is `sample_cells`, then `read_patches`."""
    whole = draw()
    cells = ats.sample_cells(LOGITS, 5, generator=seeded())
    assert type(cells) is ats.CellSample
    assert same(ats.read_patches(IMAGE, cells, (4, 7)), whole)
    boxes = whole.boxes()
    assert type(boxes) is ats.BoxSample
    assert torch.equal(boxes.offsets, whole.offsets)
    with pytest.raises(TypeError, match=r"cells must be a CellSample, as ats.sample_cells gives it, got Tensor"):
        ats.read_patches(IMAGE, cells.indices, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image has batch size 2 but cells have 3"):
        ats.read_patches(IMAGE[:2], cells, 4)


def test_images_one_by_one_and_together_again() -> None:
    sample = masked()
    assert len(sample) == 3
    for number, one in enumerate(sample):
        assert len(one) == 1
        assert torch.equal(one.patches, sample.patches[number : number + 1])
        assert same(one, sample[number])
        assert same(one, sample[number - 3])
        assert same(one, sample[number : number + 1])
    assert same(ats.PatchSample.cat(list(sample)), sample)
    assert same(ats.PatchSample.cat([sample[:1], sample[1:]]), sample)
    for number in (3, -4):
        with pytest.raises(IndexError, match=f"image {number} of a sample of 3"):
            sample[number]
    with pytest.raises(TypeError, match="by an image's number or a slice, got str"):
        sample["patches"]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"drawn alike, got PatchSample\(.*replace=False.*replace=True"):
        ats.PatchSample.cat([sample, draw(replace=True)])
    with pytest.raises(ValueError, match="drawn alike"):
        ats.CellSample.cat([ats.sample_cells(LOGITS, n) for n in (2, 3)])
    with pytest.raises(ValueError, match="at least one"):
        ats.PatchSample.cat([])


def test_weights_are_those_of_the_way_of_drawing() -> None:
    plain = draw()
    for estimator in ("ordered", "unordered"):
        assert torch.equal(plain.weights(estimator), ats.estimator_weights(plain.log_attention, estimator=estimator))
    assert_close(draw(replace=True).weights(), torch.full((3, 5), 0.2))
    assert_close(draw(selection="topk").weights(), draw(selection="topk").log_attention.softmax(-1))
    sample = masked()
    weights = sample.weights()
    assert_close(weights.sum(-1), torch.ones(3))
    assert weights[1, 2:].eq(0).all()
    assert_close(weights[1, :2], sample.log_attention[1, :2].exp())
    assert torch.equal(weights[0], sample[0].weights()[0])
    assert not draw(requires_grad=True).weights().requires_grad


def test_a_surplus_is_marked_and_repeats_the_images_first_patch() -> None:
    """Nothing else differs: the other images' draws are those of a call without a mask."""
    sample, plain = masked(), draw()
    assert sample.counts.tolist() == [5, 2, 5]
    assert sample.indices[1, 2:].eq(-1).all()
    assert sample.log_attention[1, 2:].isneginf().all()
    assert torch.equal(sample.surplus, sample.indices == -1)
    assert sorted(sample.indices[1, :2].tolist()) == [13, 14]
    assert_close(sample.log_attention[1, :2].exp().sum(), torch.tensor(1.0))
    assert torch.equal(sample.patches[1, 2:], sample.patches[1, :1].expand(3, -1, -1, -1))
    for row in (0, 2):
        assert torch.equal(sample.indices[row], plain.indices[row])
        assert torch.equal(sample.patches[row], plain.patches[row])
        assert torch.equal(sample.log_attention[row], plain.log_attention[row])
    attention = LOGITS[1, 2, 1:3].softmax(-1)
    assert_close(sample.entropy[1], torch.special.entr(attention).sum())


def test_table(tmp_path: Path) -> None:
    """A row a patch that was read: where it lies, what it is worth; written whole, and over nothing."""
    sample = masked()
    table = sample.table("unordered")
    assert len(table) == 12
    row = table[6]  # the second and last of image 1
    cell = int(sample.indices[1, 1])
    assert row == {
        "image": 1,
        "draw": 1,
        "row": cell // 6,
        "column": cell % 6,
        "top": int(sample.offsets[1, 1, 0]),
        "left": int(sample.offsets[1, 1, 1]),
        "height": 4,
        "width": 7,
        "attention": pytest.approx(float(sample.log_attention[1, 1].exp())),
        "weight": pytest.approx(float(sample.weights("unordered")[1, 1])),
    }
    path = tmp_path / "new" / "patches.csv"
    table.to_csv(path)
    read = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [{name: float(value) for name, value in line.items()} for line in read] == [dict(row) for row in table]
    with pytest.raises(FileExistsError, match=r"patches.csv is there already; .*overwrite=True"):
        table.to_csv(path)
    sample[:1].table().to_csv(path, overwrite=True)
    assert len(path.read_text().splitlines()) == 6
    assert sorted(file.name for file in path.parent.iterdir()) == ["patches.csv"]
    with pytest.raises(ValueError, match="no patches to write"):
        PatchTable().to_csv(tmp_path / "empty.csv")
    assert list(ats.sample_cells(LOGITS, 2).table()[0]) == ["image", "draw", "row", "column", "attention", "weight"]


def test_moving() -> None:
    sample = masked()
    for moved in (sample.to("meta"), sample.to(torch.device("meta")), move_data_to_device(sample, "meta")):
        assert {getattr(moved, name).device.type for name in ("patches", "indices", "entropy")} == {"meta"}
        assert (moved.padded, moved.grid_size, moved.patch_size) == (True, (4, 6), (4, 7))
    nested = move_data_to_device({"batch": [sample, IMAGE]}, "meta")
    assert nested["batch"][0].patches.device.type == "meta"
    half = sample.to(torch.float16)
    assert half.patches.dtype == half.log_attention.dtype == torch.float16
    assert half.indices.dtype == half.offsets.dtype == torch.int64
    assert same(sample.to("cpu", torch.float64), sample.to(dtype=torch.float64))
    assert same(sample.cpu(), sample)
    assert not draw(requires_grad=True).detach().log_attention.requires_grad
    assert extract_batch_size(sample) == 3
    assert extract_batch_size({"sample": sample, "number": 1}) == 3


def test_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``DataLoader(pin_memory=True)`` calls; without a GPU no memory can be pinned, so a mark stands for it."""
    pinned = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.shape)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    sample = masked()
    (got,) = pin_memory([sample])
    assert same(got, sample)
    assert len(pinned) == 6


def test_copies_and_files_hold_the_values_without_the_graph(tmp_path: Path) -> None:
    """torch refuses to copy what was computed with gradients; leaves are copied as torch copies them."""
    sample = draw(requires_grad=True)
    assert sample.log_attention.requires_grad
    deep = copy.deepcopy({"sample": sample})["sample"]
    assert same(deep, sample)
    assert not deep.log_attention.requires_grad
    assert deep.patches.data_ptr() != sample.patches.data_ptr()
    assert copy.copy(sample) is sample
    leaf = dataclasses.replace(sample, log_attention=sample.log_attention.detach().clone().requires_grad_())
    assert copy.deepcopy(leaf).log_attention.requires_grad
    assert same(pickle.loads(pickle.dumps(sample)), sample)
    for kind in (masked(), masked().boxes(), ats.sample_cells(LOGITS, 3), sample):
        path = tmp_path / "sample.pt"
        torch.save({"here": [kind]}, path)
        assert same(torch.load(path, weights_only=True)["here"][0], kind)


class Draws(Dataset[ats.PatchSample]):
    """Each item is a sample of one image, drawn by the worker, with gradients attached."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> ats.PatchSample:
        logits = LOGITS[number : number + 1].clone().requires_grad_()
        return ats.sample_patches(IMAGE[number : number + 1], logits, 5, (4, 7), selection="topk")


def test_data_loader_workers() -> None:
    """Batches of single images' samples, put together by the default collation in another process."""
    batches = list(DataLoader(Draws(), batch_size=2, num_workers=1))
    want = draw(selection="topk")
    assert [len(batch) for batch in batches] == [2, 1]
    assert same(ats.PatchSample.cat(batches), want)


def test_lightnings_predict() -> None:
    """`Trainer.predict` gives back what `predict_step` returns."""

    class Predictor(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.sampling = ats.nn.AttentionSampling(nn.Conv2d(2, 1, 1), nn.Flatten(), 5, 4)

        def predict_step(self, batch: Tensor, batch_idx: int) -> ats.PatchSample:
            return self.sampling(batch[:, :, ::4, ::4], batch)[2]

    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    got = trainer.predict(Predictor(), DataLoader(IMAGE, batch_size=2))  # type: ignore[arg-type]
    assert got is not None
    assert [len(sample) for sample in got] == [2, 1]
    assert ats.PatchSample.cat(got).patches.shape == (3, 5, 2, 4, 4)  # type: ignore[arg-type]


def test_as_a_pytree() -> None:
    sample = masked()
    leaves, spec = pytree.tree_flatten({"a": sample})
    assert len(leaves) == 6
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert same(pytree.tree_unflatten(leaves, spec)["a"], sample)
    again = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert again == spec
    assert same(pytree.tree_unflatten(leaves, again)["a"], sample)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(sample)[0]]
    assert ".patches" in paths
    assert pytree.tree_map(lambda tensor: tensor.shape[0], sample).offsets == 3


class FromView(nn.Module):
    def forward(self, view: Tensor) -> Tensor:
        return view.mean(1)


def sampling(**options: object) -> ats.nn.AttentionSampling:
    return ats.nn.AttentionSampling(FromView(), nn.Flatten(), 5, (4, 7), **options).eval()  # type: ignore[arg-type]


def test_export_of_a_whole_model(tmp_path: Path) -> None:
    """The sample comes out of an exported program, saved and loaded, as out of the model."""
    view, image = IMAGE[:, :, ::5, ::5].contiguous(), IMAGE
    model = sampling(selection="topk")
    program = torch.export.export(model, (view, image))
    torch.export.save(program, tmp_path / "model.pt2")
    pooled, logits, sample = torch.export.load(tmp_path / "model.pt2").module()(view, image)
    want = model(view, image)
    assert torch.equal(pooled, want[0])
    assert torch.equal(logits, want[1])
    assert same(sample, want[2])
    random = torch.export.export(sampling(), (view, image)).module()
    drawn = {tuple(random(view, image)[2].indices.flatten().tolist()) for _ in range(4)}
    assert len(drawn) > 1


@pytest.mark.parametrize("padded", [False, True])
def test_compile(padded: bool) -> None:
    """A sample comes out of a compiled function and goes into one, in one graph, and its pool is the same."""
    torch.compiler.reset()
    mask = torch.ones(3, 4, 6, dtype=torch.bool)
    mask[1] = False
    mask[1, 2, 1:3] = True
    given = mask if padded else None

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(image: Tensor, logits: Tensor) -> tuple[ats.PatchSample, Tensor]:
        sample = ats.sample_patches(image, logits, 5, (4, 7), mask=given, selection="topk")
        return sample, ats.pool(sample.patches, sample)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def mean(sample: ats.PatchSample) -> Tensor:
        return ats.pool(sample.patches.mean((-2, -1)), sample, estimator="unordered")

    want = draw(mask=given, selection="topk")
    sample, pooled = run(IMAGE, LOGITS)
    assert (sample.selection, sample.padded, sample.grid_size) == ("topk", padded, (4, 6))
    assert torch.equal(sample.indices, want.indices)
    assert_close(pooled, ats.pool(want.patches, want))
    drawn = masked() if padded else draw()
    assert_close(mean(drawn), ats.pool(drawn.patches.mean((-2, -1)), drawn, estimator="unordered"))
