"""A trained run's model with what it takes to use it, and the one way in which all commands predict with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ats.batches import Images, Maps, Views
from ats.experiments.build import Classifier, build_model, make_view
from ats.experiments.checkpoints import check_weights, read_checkpoint
from ats.experiments.config import ExperimentConfig
from ats.experiments.registry import from_dict
from ats.experiments.run_folder import RunFolder
from ats.inference import Prediction, anytime, predict
from ats.models import ATSClassifier, MILClassifier, NestedClassifier
from ats.paths import user_path
from ats.sources import ImageSource

Method = Literal["sample", "topk", "anytime"]


@dataclass(frozen=True)
class TrainedModel:
    """A model, in evaluation mode, that goes from images to class logits by itself.

    Attributes:
        config: of the run.
        model: the networks; a `torch.nn.Module` of (view, image).
        classes: names; a class is an index into them.
        unfinished: how far the run has come, where it has not ended: "epoch 6 of 15".

    An image has the channels that the model was trained on, in bytes or from 0 to 1, and any size that its networks can
    look at. Its view and patches are normalised as in training.
    """

    config: ExperimentConfig
    model: Classifier
    classes: tuple[str, ...]
    unfinished: str = ""

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.model.head.weight.device

    def to(self, device: torch.device | str) -> "TrainedModel":
        """Move the networks to a device; returns this."""
        self.model.to(device)
        return self

    @overload
    def view(self, image: Tensor) -> Tensor: ...
    @overload
    def view(self, image: Images | ImageSource) -> Views: ...
    def view(self, image: Images | ImageSource) -> Views:
        """What the model looks at of images (B, C, H, W) or (C, H, W): (B, C, h, w); a Deep MIL's is the image.

        Images may be sources or a list, as for `predict`; views of different sizes are a list.
        """
        return make_view(self.config, self._batch(image))

    def __call__(self, image: Images | ImageSource, *, generator: torch.Generator | None = None) -> Tensor:
        """Class logits (B, classes) float64 of images (B, C, H, W) or (C, H, W), from one draw of patches."""
        return self.predict(image, generator=generator).logits

    def predict(
        self,
        image: Images | ImageSource,
        *,
        mask: Maps | None = None,
        method: Method = "sample",
        n_patches: int | tuple[int, ...] | None = None,
        budget: int = 100,
        tolerance: float | None = None,
        lead: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """Class logits and what is known of their error, as `ats evaluate` has them.

        Args:
            image: (B, C, H, W) or (C, H, W), on the model's device or in main memory; an image on disk, as
                `ats.open_image` gives it; or a list of either, of any sizes.
            mask: bool, True where a cell may be drawn, as in `ats.sample_cells`.
            method, n_patches, budget, tolerance, lead: as in `ats.predict` and `ats.anytime`. A draw is pooled by the
                estimator that the run was trained with.
            generator: of the draws, on the model's device.

        Raises:
            ValueError: an image of other channels; options that the model has no use for.
        """
        image = self._batch(image)
        options: dict[str, Any] = {"budget": budget, "tolerance": tolerance, "lead": lead}
        options = options if method == "anytime" else {"n_patches": n_patches}
        view = make_view(self.config, image)
        view = view.to(self.device) if isinstance(view, Tensor) else [each.to(self.device) for each in view]
        return predict_with(self.model, view, image, mask=mask, method=method, generator=generator, **options)

    def _batch(self, image: Images | ImageSource) -> Images:
        channels = self.config.data.channels
        if not isinstance(image, Tensor):
            images = [image] if isinstance(image, ImageSource) else list(image)
            for one in images:
                found = one.shape[0] if isinstance(one, Tensor) else one.channels
                if found != channels:
                    name = "an image" if isinstance(one, Tensor) else one.name
                    raise ValueError(f"this model takes images of {channels} channels, and {name} has {found}")
            return images
        batch = image.unsqueeze(0) if image.ndim == 3 else image
        if batch.ndim != 4 or batch.shape[1] != channels:
            raise ValueError(
                f"this model takes images (B, {channels}, H, W) or ({channels}, H, W), got {tuple(image.shape)}"
            )
        return batch


@torch.no_grad()
def predict_with(
    model: Classifier,
    view: Views,
    image: Images,
    *,
    mask: Maps | None = None,
    method: Method = "sample",
    n_patches: int | tuple[int, ...] | None = None,
    generator: torch.Generator | None = None,
    **stop: Any,
) -> Prediction:
    """Class logits of one draw by any model, pooled by its own estimator: the way that all commands go.

    It changes nothing of the model.

    Args:
        model: in evaluation mode.
        view: (B, C, h, w), as the model takes it.
        image: (B, C, H, W).
        mask: where it may look, as in `ats.sample_cells`. Views, images and masks may be sequences.
        method: "sample", "topk" or "anytime".
        n_patches: patches an image, not with "anytime"; what it was trained with where None.
        generator: of the draws.
        stop: with "anytime", when to: as in `ats.anytime`.

    Raises:
        ValueError: options that the model has no use for.
    """
    if isinstance(model, ATSClassifier | NestedClassifier):
        inputs = model.sampling, model.classify, view, image
        if method == "anytime":
            return anytime(*inputs, mask=mask, generator=generator, **stop)
        own = model.sampling.estimator if method == "sample" else None
        if isinstance(model, NestedClassifier) and own == "ordered" and not model.sampling.replace:
            own = None  # the mean over all orders of the draw: in levels, the ordered one has no standard error
        return predict(*inputs, mask=mask, selection=method, n_patches=n_patches, estimator=own, generator=generator)
    if (method, n_patches) != ("sample", None):
        kind = "Deep MIL" if isinstance(model, MILClassifier) else "a CNN"
        raise ValueError(f"{kind} draws no patches: method and n_patches do not apply to it")
    logits = model(view, image)[0].double()
    none = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return Prediction(logits, None, patches_used=none, stopped=none.bool())


def load(run: Path | str, *, device: torch.device | str = "cpu") -> TrainedModel:
    """A trained model from a run's folder, or from a checkpoint that `ats train` wrote.

    Args:
        run: the folder, or RUN/checkpoints/last.ckpt.
        device: where its networks go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of this project, or was written by another version of it.
    """
    path = checkpoint_of(user_path(run))
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; `ats train` writes RUN/checkpoints/last.ckpt")
    content = read_checkpoint(path)
    try:
        values = content["hyper_parameters"]["config"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint that `ats train` wrote: it has no configuration") from error
    try:
        config = from_dict(values)
        with torch.random.fork_rng(devices=[]):  # the fresh weights, which are written over, are nobody's draws
            model = build_model(config)
        state = {name.removeprefix("model."): value for name, value in content["state_dict"].items()}
        check_weights(path, state, model)
        model.load_state_dict(state)
        classes = tuple(content["classes"])
        if len(classes) != config.data.n_classes or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"{config.data.n_classes} classes have the names {classes!r:.80}")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} was written by another version of ats, or is damaged: {error}") from error
    return TrainedModel(config, model.to(device).eval(), classes, _unfinished(path.parents[1], content, config))


def _unfinished(run: Path, content: Any, config: ExperimentConfig) -> str:
    folder = RunFolder(run)
    if not folder.config.is_file() or folder.summary.is_file():  # a checkpoint by itself may be of any run
        return ""
    if config.optim.updates:
        return f"update {content.get('global_step', 0):,} of {config.optim.updates:,}"
    return f"epoch {content.get('epoch', -1) + 1} of {config.optim.epochs}"


def checkpoint_of(run: Path) -> Path:
    """The checkpoint of a run's folder that is evaluated, or the file itself."""
    if not run.is_dir():
        return run
    best = run / "checkpoints" / "best.ckpt"
    return best if best.is_file() else run / "checkpoints" / "last.ckpt"
