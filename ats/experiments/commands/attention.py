"""`ats attention`: where a trained model looks in an image of yours: a picture, a table, or for other programs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from ats import export
from ats.experiments.console import say
from ats.experiments.inputs import LookOptions, answer, load_for, mask_for, open_for, probabilities
from ats.experiments.localisation import attention_map
from ats.experiments.options import parse
from ats.experiments.plotting.overlay import Attention, Seen, best_patches, draw_overlay, heaviest
from ats.experiments.plotting.zoom import draw_zoom
from ats.models import ATSClassifier, NestedClassifier
from ats.nested_maps import zoomed_heatmap
from ats.nested_sample import NestedSample
from ats.prediction import Prediction
from ats.regions import Reading, read_regions
from ats.samples import PatchTable
from ats.sources import ImageSource, read_view

_SHOWN = 3000  # pixels of the longer side of a picture's image, at most
_ENLARGED = 512  # pixels of the longer side of a patch that is read for the picture; larger ones are cut from it


@dataclass(frozen=True)
class AttentionOptions(LookOptions):
    """Where a trained model looks in an image, which may have any size."""

    checkpoint: tyro.conf.Positional[Path] = field(kw_only=True)
    """A run's folder, or its checkpoints/last.ckpt, as `ats train` wrote it."""
    image: tyro.conf.Positional[Path] = field(kw_only=True)
    """An image file, or a slide."""
    mask: Path | None = None
    """Where to look: an image file or GeoJSON polygons."""
    format: Literal["png", "zoom", "csv", "geojson", "tiff"] = "png"
    """A picture; with --model.levels, one of the way to the patches; a table of the patches read; these as detections
    for QuPath; or a pyramidal OME-TIFF heatmap."""
    output: Path | None = None
    """Where it goes; default: attention.FORMAT here, or zoom.png. A file that is there is not overwritten."""
    bounds: bool = True
    """geojson: count pixels from the corner of what was scanned, where a slide names it (openslide.bounds-x and -y), as
    QuPath does where it opens the slide by OpenSlide; else from the slide's own corner."""
    n_patches: int | None = None
    """Patches to draw; default: what the model was trained with. Deep MIL reads them all, and draws none."""
    seed: int = 0
    """Decides the draw."""


@torch.no_grad()
def draw_image(options: AttentionOptions) -> str:
    """Write the file, and return what the model makes of the image.

    Raises:
        ValueError: a model without attention, an image that is too small for it.
        FileExistsError: there is a file where it would go.
    """
    output = options.output or Path("zoom.png" if options.format == "zoom" else f"attention.{options.format}")
    if output.exists():
        raise FileExistsError(f"{output} is there already; name another file with --output")
    trained = load_for(options.checkpoint, options)
    source, image, strange = open_for(trained, options.image, options.mpp)
    if strange is not None:
        say(f"note: {options.image}: {strange.text}", stderr=True)
    full = source.levels[0]
    view = trained.view(image)
    assert isinstance(view, Tensor)  # of one image
    view, mask = view.to(trained.device), mask_for(trained, source, options.mask, options)
    if isinstance(image, Tensor):
        image = image.to(trained.device)
    weights, offsets, patch_size = attention_map(trained.model, view, image, mask)
    weights, offsets = weights.cpu(), offsets.cpu()
    live = weights.shape[1] if mask is None else int(mask.sum())
    count = None
    if isinstance(trained.model, ATSClassifier):
        sampling = trained.model.sampling
        count = sampling.n_patches if options.n_patches is None else options.n_patches
        if count > live and not sampling.replace:
            raise ValueError(
                f"the attention on {options.image}, {full.height}×{full.width} pixels, has {live} "
                f"cells to draw, too few for {count} patches; choose fewer with --n-patches, or a larger image"
            )
    elif isinstance(trained.model, NestedClassifier):
        if options.n_patches is not None:
            raise ValueError("--n-patches is for attention on one view; this model draws as its levels say")
    elif options.format != "png":
        raise ValueError(f"{trained.config.model.method} draws no patches: --format {options.format} is for ats")
    if options.format == "zoom" and not isinstance(trained.model, NestedClassifier):
        raise ValueError("--format zoom is for models with --model.levels; this one looks once: choose png")
    generator = torch.Generator(trained.device).manual_seed(options.seed)
    prediction = trained.predict(image, mask=mask, n_patches=count, generator=generator)
    found = _in_words(
        trained.config.data, answer(trained, prediction.logits[0]), probabilities(trained, prediction.logits[0])
    )
    if options.format == "csv":
        prediction.table().to_csv(output)
    elif options.format == "geojson":
        scanned = getattr(source, "bounds", None) if options.bounds else None
        corner = (0, 0) if scanned is None else (scanned[0], scanned[1])
        export.geojson(output, source, prediction.samples[0], estimator=prediction.estimator, origin=corner)
    elif isinstance(trained.model, NestedClassifier) and options.format in ("tiff", "zoom"):
        sample = prediction.samples[0]
        assert isinstance(sample, NestedSample)
        picture = zoomed_heatmap(trained.model.sampling, view, image, sample, mask=mask)[0]
        if options.format == "tiff":
            export.mass_tiff(output, source, picture)
        else:
            title = f"{options.image.name}: {found}"
            draw_zoom(source, sample, output, title=title, attention=picture, estimator=prediction.estimator)
    elif options.format == "tiff":
        assert isinstance(trained.model, ATSClassifier)
        sampling = trained.model.sampling
        export.heatmap_tiff(
            output,
            source,
            sampling.attention(view).cpu(),
            mask=None if mask is None else mask.cpu(),
            view_size=(view.shape[-2], view.shape[-1]),
            receptive_field=sampling.sampler.receptive_field,
        )
    else:
        drawn = [(int(box["top"]), int(box["left"])) for box in _framed(prediction)]
        title = f"{options.image.name}, {full.height}×{full.width}: {found}"
        shown = _shown(source, image)
        corners = [(round(top * shown.scale), round(left * shown.scale)) for top, left in drawn]
        whole = Attention(weights[0], offsets, patch_size)
        best = _best(source, shown, whole)
        draw_overlay(shown.pixels, shown.of(whole), output, title=title, drawn=corners, best=best)
    return f"{found}; where it looked: {output}"


def _framed(prediction: Prediction) -> PatchTable:
    """What is framed in the picture: the patches drawn, or with levels the regions."""
    sample = prediction.samples[0] if prediction.samples else None
    return sample.levels[0].table() if isinstance(sample, NestedSample) else prediction.table()


def _in_words(data: object, label: str, likely: "object") -> str:
    if getattr(data, "task", "classes") == "value":
        return f"value {label}"
    if getattr(data, "task", "classes") == "labels":
        return f'labels "{label}"'
    assert isinstance(likely, list)
    return f'class "{label}" with probability {max(likely):.2f}'


class _Shown(NamedTuple):
    """The image of a picture, (C, h, w) in bytes: its size relative to the image's; what is black, what is white."""

    pixels: Tensor
    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def of(self, attention: Attention) -> Attention:
        """Attention on the image as attention on the picture."""
        if self.scale == 1:
            return attention
        height, width = (max(1, round(side * self.scale)) for side in attention.patch_size)
        return Attention(attention.weights, (attention.offsets * self.scale).round().long(), (height, width))

    def in_bytes(self, values: Tensor) -> Tensor:
        """What was read (C, h, w), as the picture shows it."""
        values = (values.float() - self.low) / max(self.high - self.low, 1e-12)
        values = values[:3] if values.shape[0] >= 3 else values[:1]
        return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def _shown(source: ImageSource, image: Tensor | list[ImageSource]) -> _Shown:
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        return _Shown(image[0])
    full = source.levels[0]
    scale = min(1.0, _SHOWN / max(full.height, full.width))
    view = read_view(source, scale=scale)
    shown = _Shown(view, scale)
    if source.dtype != torch.uint8:  # between the least and the most there is
        shown = shown._replace(low=float(view.amin()), high=float(view.amax()))
    return shown._replace(pixels=shown.in_bytes(view))


def _best(source: ImageSource, shown: _Shown, attention: Attention) -> list[Seen]:
    """The patches of most attention, at full resolution where the picture has less."""
    if shown.scale == 1 or max(attention.patch_size) > _ENLARGED:
        return best_patches(shown.pixels, shown.of(attention))
    cells = heaviest(attention)
    small = shown.of(attention)
    patches = read_regions([source], attention.offsets[cells][None], attention.patch_size, 1, Reading())[0]
    return [
        Seen((top, left), small.patch_size, shown.in_bytes(patch), weight)
        for (top, left), patch, weight in zip(
            small.offsets[cells].tolist(), patches.cpu(), attention.weights[cells].tolist(), strict=True
        )
    ]


def run_attention(arguments: list[str]) -> None:
    """`ats attention`."""
    say(draw_image(parse(AttentionOptions, "ats attention", arguments)))
