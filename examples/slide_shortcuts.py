"""Can the slides of `ats synthesise slides` be told apart without looking closely, and does a model look at the spots?

    python examples/slide_shortcuts.py slides runs/slides --output shortcuts.json

Needs: pip install 'torch-ats[experiments,slides]'
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import ats
from ats.datasets.manifest import Row, read_manifest
from ats.experiments.trained import TrainedModel

SCALE = 1 / 16


def mean_colour(view: Tensor, tissue: Tensor) -> Tensor:
    return torch.cat([view.mean((1, 2)), view[:, tissue].mean(1), view[:, tissue].std(1)])


def histogram(view: Tensor, tissue: Tensor) -> Tensor:
    red, green, blue = (view[:, tissue] * 7.999).long()
    return torch.bincount(red * 64 + green * 8 + blue, minlength=512).div(int(tissue.sum())).sqrt()


def error_of(inputs: dict[str, Tensor], labels: dict[str, Tensor], penalty: float = 0.1) -> float:
    """Test error of a logistic regression."""
    mean, std = inputs["train"].mean(0), inputs["train"].std(0).clamp(min=1e-3)
    scaled = {name: F.pad((values - mean) / std, (0, 1), value=1.0).double() for name, values in inputs.items()}
    weight = torch.zeros(scaled["train"].shape[1], dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=300)

    def loss() -> Tensor:
        optimiser.zero_grad()
        fit = F.binary_cross_entropy_with_logits(scaled["train"] @ weight, labels["train"].double())
        total = fit + penalty * weight.square().mean()
        total.backward()
        return total

    optimiser.step(loss)
    return float(((scaled["test"] @ weight > 0) != labels["test"]).double().mean())


@torch.no_grad()
def attention_on_spots(trained: TrainedModel, row: Row, kind: str) -> tuple[float, float] | None:
    """The share of attention in spots of a kind, and their share of the tissue; None: there are none."""
    path = row.path.parent.parent / "spots" / f"{row.path.stem}-{kind}.geojson"
    if not path.exists():
        return None
    slide = ats.open_image(row.path)
    full, sampling = (slide.levels[0].height, slide.levels[0].width), trained.model.sampling
    small = full[0] // 8, full[1] // 8
    (view,) = trained.view([slide])
    where = {"view_size": (view.shape[-2], view.shape[-1]), "receptive_field": sampling.sampler.receptive_field}
    logits, seen = sampling.attention(view[None]), ats.tissue_mask(ats.read_view(slide, scale=SCALE))
    cells = ats.mask_cells(seen, (logits.shape[-2], logits.shape[-1]), slide, **where)
    mass = ats.heatmap(logits, full, size=small, mask=cells[None], **where)[0]
    spots, tissue = ats.mask_cells(path, small, slide), ats.mask_cells(seen, small, slide)
    return float(mass[spots].sum()), float((spots & tissue).sum() / tissue.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that `ats synthesise slides` wrote")
    parser.add_argument("run", type=Path, help="of `ats train images` on it")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args()
    manifest = read_manifest(options.data / "labels.csv")
    rows = {split: manifest.select(split) for split in ("train", "test")}
    labels = {split: torch.tensor([row.label == "positive" for row in chosen]) for split, chosen in rows.items()}
    found: dict[str, float] = {}
    for statistic in (mean_colour, histogram):
        inputs = {}
        for split, chosen in rows.items():
            views = [ats.read_view(ats.open_image(row.path), scale=SCALE) for row in chosen]
            inputs[split] = torch.stack([statistic(view, ats.tissue_mask(view)) for view in views])
        found[f"error by {statistic.__name__.replace('_', ' ')}"] = error_of(inputs, labels)
    trained = ats.load(options.run)
    for kind in ("stained", "smeared"):
        each = [shares for row in rows["test"] if (shares := attention_on_spots(trained, row, kind)) is not None]
        mass, uniform = torch.tensor(each).mean(0).tolist()
        found |= {f"attention on {kind} spots": mass, f"share of tissue in {kind} spots": uniform}
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
