"""The ops of attention sampling: tensors in, tensors out.

Each op lives in a folder of its own, beside a reference in plain PyTorch (``<op>_ref``) that every faster
implementation is tested against. Nothing here knows of modules, models or data sets.
"""

from ats_kernels.patches.launch import extract_patches_ref
from ats_kernels.patches.op import extract_cells, extract_patches
from ats_kernels.pooling.op import (
    estimator_weights,
    expectation,
    expectation_ref,
)
from ats_kernels.pooling.weights import estimator_weights_ref
from ats_kernels.sampling.draws import Draw
from ats_kernels.sampling.op import sample
from ats_kernels.sampling.reference import sample_ref
from ats_kernels.views.op import area_downsample, area_downsample_ref

__all__ = [
    "Draw",
    "area_downsample",
    "area_downsample_ref",
    "estimator_weights",
    "estimator_weights_ref",
    "expectation",
    "expectation_ref",
    "extract_cells",
    "extract_patches",
    "extract_patches_ref",
    "sample",
    "sample_ref",
]
