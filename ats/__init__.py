"""Attention sampling: learn from images too large to process whole.

A small network looks at a low-resolution view, a few patches are drawn from its attention, and only those are
read from the full-resolution image (Katharopoulos & Fleuret, ICML 2019).
"""

from ats import diagnostics, nn
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
from ats.grid import cell_offsets, patch_positions
from ats.inference import Prediction, anytime, predict
from ats.probe import receptive_field
from ats.version import __version__
from ats_kernels.pooling.variance import Estimate, estimate

__all__ = [
    "BoxSample",
    "CellSample",
    "Estimate",
    "PatchSample",
    "Prediction",
    "__version__",
    "anytime",
    "area_downsample",
    "cell_offsets",
    "diagnostics",
    "estimate",
    "estimator_weights",
    "expectation",
    "nn",
    "patch_positions",
    "pool",
    "predict",
    "read_patches",
    "receptive_field",
    "sample_cells",
    "sample_patches",
]
