"""The ops of attention sampling: tensors in, tensors out.

Each op lives in a file of its own, beside a reference in plain PyTorch (``<op>_ref``) that every faster
implementation is tested against. Nothing here knows of modules, models or data sets.
"""

from ats_kernels._weights import estimator_weights_ref
from ats_kernels.area_downsample import area_downsample, area_downsample_ref
from ats_kernels.expectation import (
    estimator_weights,
    expectation,
    expectation_ref,
)
from ats_kernels.extract_patches import extract_patches, extract_patches_ref
from ats_kernels.sample import Draw, sample, sample_ref

__all__ = [
    "Draw",
    "area_downsample",
    "area_downsample_ref",
    "estimator_weights",
    "estimator_weights_ref",
    "expectation",
    "expectation_ref",
    "extract_patches",
    "extract_patches_ref",
    "sample",
    "sample_ref",
]
