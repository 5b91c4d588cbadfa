"""How much of the attention is where the evidence is, for attention sampling and Deep MIL alike.

A cell is *on target* if its patch shows the centre of a target: of an epithelial nucleus, of the speed limit's sign.
Only images that have targets count; every figure is a mean over them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

import ats_kernels
from ats import functional
from ats.batches import Maps, size_of
from ats.datasets.image_dataset import Region
from ats.experiments.build import Classifier
from ats.experiments.experiment import ExperimentData
from ats.experiments.trained import TrainedModel
from ats.grid import cell_offsets
from ats.models import ATSClassifier, MILClassifier, NestedClassifier
from ats.sources import ImageSource


@dataclass(frozen=True)
class Localisation:
    """Where the attention is, over `images` test images that have targets.

    Attributes:
        mass: attention on target.
        uniform_mass: the same, if attention were the same everywhere: the share of cells on target.
        times_uniform: mass / uniform_mass.
        hit_rate: images in which at least one of `n_draws` patches, drawn without replacement, is on target.
        draws_on_target: draws that are.
        average_precision: of the map as a ranking of the cells; by chance it is about uniform_mass.
    """

    images: int
    n_draws: int
    mass: float
    uniform_mass: float
    times_uniform: float
    hit_rate: float
    draws_on_target: float
    average_precision: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def attention_map(
    model: Classifier, view: Tensor, image: Tensor | Sequence[ImageSource], mask: Maps | None = None
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Attention (B, K) over a model's cells, their patches' top-left pixels (K, 2), and the patches' size.

    Args:
        model: in evaluation mode.
        view: (B, C, h, w), as the model takes it.
        image: (B, C, H, W), or a list of one source.
        mask: (B, gh, gw) bool, True where it may look; elsewhere attention is 0.

    Raises:
        ValueError: the model has no attention.
    """
    size = size_of(image if isinstance(image, Tensor) else image[0])
    if isinstance(model, MILClassifier):
        assert isinstance(image, Tensor)  # whose views are the images themselves
        _, log_attention, offsets = model.pool(image)
        return log_attention.exp(), offsets, (model.patch_size, model.patch_size)
    if isinstance(model, NestedClassifier):
        look = model.sampling.look(view, image, mask)
        every = torch.arange(look.logits.flatten(1).shape[1], device=view.device).expand(len(view), -1)
        boxes, side = model.sampling.boxes(0, look, every)
        return look.logits.flatten(1).softmax(-1), boxes[0], side
    if not isinstance(model, ATSClassifier):
        raise ValueError(f"{type(model).__name__} has no attention")
    logits = functional.mask_logits(model.sampling.attention(view), mask)
    grid, sampler = (logits.shape[-2], logits.shape[-1]), model.sampling.sampler
    cells = torch.arange(grid[0] * grid[1], device=logits.device)
    offsets = cell_offsets(
        cells,
        grid,
        size,
        sampler.patch_size,
        view_size=(view.shape[-2], view.shape[-1]),
        receptive_field=sampler.receptive_field,
    )
    return logits.flatten(1).softmax(-1), offsets, sampler.patch_size


def on_target(offsets: Tensor, patch_size: tuple[int, int], targets: Sequence[Region]) -> Tensor:
    """Which patches (K,) bool show the centre of a target.

    Args:
        offsets: (K, 2) top-left pixels (y, x).
        patch_size: pixels (ph, pw).
        targets: of one image.
    """
    return shows(offsets, patch_size, targets).any(-1)


def shows(offsets: Tensor, patch_size: tuple[int, int], regions: Sequence[Region]) -> Tensor:
    """Which patches show the centre of which region, (K, T) bool; arguments as of `on_target`."""
    if not regions:
        return torch.zeros(len(offsets), 0, dtype=torch.bool, device=offsets.device)
    centres = torch.tensor([region.centre for region in regions], dtype=torch.float64, device=offsets.device)  # (T, 2)
    inside = torch.ones(len(offsets), len(regions), dtype=torch.bool, device=offsets.device)
    for axis in (0, 1):
        within = centres[:, axis] - offsets[:, axis, None]  # (K, T), from the patch's corner
        inside &= (within >= 0) & (within < patch_size[axis])
    return inside


@torch.no_grad()
def localise(trained: TrainedModel, data: ExperimentData, *, n_draws: int = 10, seed: int = 0) -> Localisation:
    """Compare a trained model's attention on test images with the ground truth.

    Args:
        trained: of a method with attention.
        data: whose test images are looked at.
        n_draws: patches drawn for the hit rate.
        seed: of these draws.

    Raises:
        ValueError: no test image has a target, or the model no attention.
    """
    generator = torch.Generator(trained.device).manual_seed(seed)
    rows: list[list[float]] = []  # an image each: mass, uniform mass, hit, share of draws, average precision
    images = len(data.labels("test"))
    for index in range(images):
        if not (targets := data.targets(index)):
            continue
        index_of = torch.tensor([index], device=trained.device)
        view, image, _ = data.load("test", index_of)
        attention, offsets, patch_size = attention_map(trained.model, view, image, data.masks("test", index_of))
        target = on_target(offsets, patch_size, targets)
        if not bool(target.any()):  # between the patches of a grid with gaps
            rows.append([0.0] * 5)
            continue
        drawn = min(n_draws, attention.shape[1])
        cells = ats_kernels.sample(attention.log(), drawn, generator=generator).indices[0]
        hits = target[cells].double()
        ranking = attention[0] / attention[0].max()
        rows.append(
            [
                float(attention[0, target].double().sum()),
                float(target.double().mean()),
                float(hits.amax()),
                float(hits.mean()),
                float(binary_average_precision(ranking, target.long())),
            ]
        )
    if not rows:
        raise ValueError(f"none of the {images} test images of {data.source} has a target")
    mass, uniform, hit, share, precision = torch.tensor(rows, dtype=torch.float64, device="cpu").mean(0).tolist()
    return Localisation(
        images=len(rows),
        n_draws=n_draws,
        mass=mass,
        uniform_mass=uniform,
        times_uniform=mass / uniform,
        hit_rate=hit,
        draws_on_target=share,
        average_precision=precision,
    )
