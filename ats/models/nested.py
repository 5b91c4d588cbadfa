"""A linear classifier on features of nested attention sampling."""

import torch
from torch import Tensor, nn

from ats.batches import Images, Maps, Views
from ats.models.classifier import SamplingClassifier
from ats.nested_sample import NestedSample
from ats.nn import NestedAttentionSampling


class NestedClassifier(SamplingClassifier):
    """Φ̂ from nested attention sampling, then one linear layer; arguments as of `ATSClassifier`."""

    def __init__(
        self, sampling: NestedAttentionSampling, n_features: int, n_classes: int, feature_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.sampling = sampling
        self.head = nn.Linear(n_features, n_classes)
        self.feature_scale = feature_scale

    def forward(
        self,
        view: Views | None,
        image: Images,
        *,
        mask: Maps | None = None,
        generator: torch.Generator | None = None,
        draws: int = 1,
    ) -> tuple[Tensor, NestedSample]:
        """View (B, C, h, w) and image (B, C, H, W) -> class logits (draws·B, n_classes), `NestedSample`.

        Arguments and draws as in `ATSClassifier`; `view` and `mask` as `ats.nn.NestedAttentionSampling` takes them.
        """
        pooled, _, sample = self.sampling(view, image, mask=mask, generator=generator)
        more: list[Tensor] = []
        if draws > 1:
            look = self.sampling.look(view, image, mask)  # the first level alone, once more
            drawn = (self.sampling.draw(image, look, generator=generator) for _ in range(draws - 1))
            more = [self.sampling.pool_levels(*each) for each in drawn]
        return self.classify(torch.cat([pooled, *more])), sample
