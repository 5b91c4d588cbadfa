"""Attention sampling: learn from images too large to process whole.

A small network looks at a low-resolution view, a few patches are drawn from its attention, and only those are
read from the full-resolution image (Katharopoulos & Fleuret, ICML 2019).
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats.version import __version__

if TYPE_CHECKING:
    import torch

    from ats import diagnostics, export, nn, sources
    from ats.draw_plan import DrawPlan
    from ats.experiments.trained import TrainedModel
    from ats.functional import (
        BoxSample,
        CellSample,
        PatchSample,
        area_downsample,
        estimator_weights,
        expectation,
        pool,
        read_patches,
        sample_cells,
        sample_patches,
    )
    from ats.grid import Placement, cell_offsets, patch_positions
    from ats.heatmaps import heatmap
    from ats.inference import anytime, predict
    from ats.nested_inference import plan_draws
    from ats.nested_sample import NestedSample
    from ats.prediction import Prediction
    from ats.probe import measure_placement, receptive_field
    from ats.sources import ImageSource, mask_cells, open_image, read_view, tissue_mask
    from ats_kernels.pooling.variance import Estimate, estimate

__all__ = [
    "BoxSample",
    "CellSample",
    "DrawPlan",
    "Estimate",
    "ImageSource",
    "NestedSample",
    "PatchSample",
    "Placement",
    "Prediction",
    "__version__",
    "anytime",
    "area_downsample",
    "cell_offsets",
    "diagnostics",
    "estimate",
    "estimator_weights",
    "expectation",
    "export",
    "heatmap",
    "load",
    "mask_cells",
    "measure_placement",
    "nn",
    "open_image",
    "patch_positions",
    "plan_draws",
    "pool",
    "predict",
    "read_patches",
    "read_view",
    "receptive_field",
    "sample_cells",
    "sample_patches",
    "sources",
    "tissue_mask",
]


# What is above, for a type checker, as it is found by name: only then, so that `ats --help` waits for no torch.
_MODULES = {
    "ats": ("diagnostics", "export", "nn", "sources"),
    "ats.draw_plan": ("DrawPlan",),
    "ats.functional": (
        "BoxSample",
        "CellSample",
        "PatchSample",
        "area_downsample",
        "estimator_weights",
        "expectation",
        "pool",
        "read_patches",
        "sample_cells",
        "sample_patches",
    ),
    "ats.grid": ("Placement", "cell_offsets", "patch_positions"),
    "ats.heatmaps": ("heatmap",),
    "ats.inference": ("anytime", "predict"),
    "ats.nested_inference": ("plan_draws",),
    "ats.nested_sample": ("NestedSample",),
    "ats.prediction": ("Prediction",),
    "ats.probe": ("measure_placement", "receptive_field"),
    "ats.sources": ("ImageSource", "mask_cells", "open_image", "read_view", "tissue_mask"),
    "ats_kernels.pooling.variance": ("Estimate", "estimate"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is asked for, once."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ats' has no attribute {name!r}")
    value = importlib.import_module(f"ats.{name}") if home == "ats" else getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(run: Path | str, *, device: "torch.device | str" = "cpu") -> "TrainedModel":
    """A model that `ats train` trained, ready to use: `ats.load(run).predict(image)`.

    It knows its classes' names and how images are to be looked at. Needs what the commands need.

    Args:
        run: the run's folder, or its checkpoints/last.ckpt.
        device: where its networks go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of this project, or was written by another version of it.
        ModuleNotFoundError: the extra is not installed; says how to get it.
    """
    try:  # only now: the core needs torch and NumPy alone
        from ats.experiments.trained import load as load_run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("ats", "ats_kernels"):
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed; ats.load needs: pip install 'torch-ats[experiments]'", name=error.name
        ) from error
    return load_run(run, device=device)
