"""Attention sampling: learn from images too large to process whole.

A small network looks at a low-resolution view, a few patches are drawn from its attention, and only those are
read from the full-resolution image (Katharopoulos & Fleuret, ICML 2019).
"""

from ats import nn
from ats.functional import (
    PatchSample,
    area_downsample,
    estimator_weights,
    expectation,
    sample_patches,
)
from ats.geometry import cell_offsets, receptive_field
from ats.version import __version__

__all__ = [
    "PatchSample",
    "__version__",
    "area_downsample",
    "cell_offsets",
    "estimator_weights",
    "expectation",
    "nn",
    "receptive_field",
    "sample_patches",
]
