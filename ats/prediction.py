"""What `ats.predict` and `ats.anytime` return."""

import functools
import math
from dataclasses import dataclass

from torch import Tensor

from ats.nested_sample import NestedSample
from ats.samples import BoxSample, Estimator, PatchTable


@dataclass(frozen=True)
class Prediction:
    """Class logits of B images, and what is known of their error.

    Attributes:
        logits: (B, C) float64, unbiased for the logits of the full model, which reads every cell (not with "topk").
        standard_error: (B, C) of the logits over draws, estimated; 0 where every cell was read. None where draws say
            nothing of the error: with "topk", or a single patch.
        patches_used: (B,) int64, patches read.
        stopped: (B,) bool, whether an image met a criterion before its budget was spent.
        samples: which patches were read: for each of the B images a `BoxSample` of one row (1, N) or, where draws were
            repeated, of one row a draw, each with as many patches as were read of that image.
        estimator: that the patches of the samples were pooled by.
        degrees: (B,) of freedom that the standard error has; None: patches_used − 1. Of a nested model those of the
            regions, which are fewer.
    """

    logits: Tensor
    standard_error: Tensor | None
    patches_used: Tensor
    stopped: Tensor
    samples: tuple[BoxSample | NestedSample, ...] = ()
    estimator: Estimator = "unordered"
    degrees: Tensor | None = None

    def table(self) -> PatchTable:
        """A row a patch that was read, as `BoxSample.table` has them: the weights of an image sum to 1.

        Where draws were repeated, `draw` counts on through them, and each has its share of the weight.
        """
        rows = PatchTable()
        for image, sample in enumerate(self.samples):
            for number, row in enumerate(sample.table(self.estimator)):
                rows.append(row | {"image": image, "draw": number, "weight": row["weight"] / len(sample)})
        return rows

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper ends (B, C) of intervals that hold the full model's logits, each at this rate over draws.

        Student's t with patches_used − 1 degrees of freedom, or `degrees`, makes up for the estimated standard error as
        far as that can be: docs/inference.md gives the rates that were measured.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {confidence}; 0.95 covers 19 times in 20")
        if self.standard_error is None:
            raise ValueError("this prediction has no standard error: draw at least 2 patches by selection='sample'")
        degrees = self.patches_used - 1 if self.degrees is None else self.degrees
        quantiles = [student_quantile(confidence, max(1, one)) for one in degrees.tolist()]
        half = self.standard_error.new_tensor(quantiles).unsqueeze(-1) * self.standard_error
        return self.logits - half, self.logits + half


@functools.lru_cache(maxsize=4096)
def student_quantile(confidence: float, degrees: int) -> float:
    """How many standard errors either side of an estimate hold a share `confidence` of Student's t."""
    low, high = 0.0, 1.0  # of the angle θ = atan(t / √ν), in quarter turns
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle * math.pi / 2, degrees) < confidence else (low, middle)
    return math.tan(low * math.pi / 2) * math.sqrt(degrees)


def _student_within(angle: float, degrees: int) -> float:
    """P(|t| ≤ √ν tan θ) for whole ν (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for number in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * number / (number + 1)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
