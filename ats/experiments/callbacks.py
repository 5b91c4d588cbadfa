"""Look at the attention as training goes on: log what `ats.diagnostics` measures, and warn where it looks wrong."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ats import diagnostics, functional
from ats.functional import PatchSample, estimate_pooled
from ats.nested_sample import NestedSample
from ats.nested_variance import estimate_parts
from ats.nn import AttentionSampling, NestedAttentionSampling
from ats_kernels.checks import check_count

Output = tuple[Tensor, Tensor, PatchSample]  # pooled features, logits and sample, of an `AttentionSampling`
NestedOutput = tuple[Tensor, Tensor, NestedSample]  # the same of a `NestedAttentionSampling`


class AttentionWarning(UserWarning):
    """Attention that is likely to keep the model from learning."""


class AttentionDiagnostics(Callback):
    """Every so many steps, log numbers of the batch at hand to the trainer's loggers, and warn once of each cause.

    What is logged, as attention/NAME, means over the batch: effective_patches, covered_mass, relative_entropy,
    peak_mass, border_mass, relative_error (of the pooled features, one standard error) and, where a loss is given, over
    repeated draws, repeated_error (the same) and gradient_snr of the attention network's parameters.
    docs/diagnostics.md says how to read them.

    Training is not touched: no random number of its stream is used, batch normalisation keeps its statistics, and
    between the steps looked at nothing runs but a sum of losses. Only rank 0 looks.

    Args:
        every: steps between looks.
        chance: the loss, in nats, of giving each class its share of the training images, log(classes) if these are
            equal; without it a plateau is not told, nor collapse from what the task may need.
        loss: (module, batch, generator) -> the loss that is to have its gradient measured, drawn with the generator.
        gradient_draws: draws for that measurement; each costs a forward and a backward pass in evaluation mode.
        patience: looks in a row before attention is warned of.
        plateau_steps: steps in a row before a plateau is.
        labels: batch -> the images' classes (B,) int64; without it, attention that explains one class only is not told.

    A LightningModule whose training_step returns a dict may give the loss without regularisers as "task_loss".
    """

    def __init__(
        self,
        every: int,
        *,
        chance: float | None = None,
        loss: Callable[[L.LightningModule, Any, torch.Generator], Tensor] | None = None,
        gradient_draws: int = 4,
        patience: int = 3,
        plateau_steps: int = 500,
        labels: Callable[[Any], Tensor] | None = None,
    ) -> None:
        counts = {"every": every, "patience": patience, "plateau_steps": plateau_steps}
        for name, value in (*counts.items(), ("gradient_draws", gradient_draws)):
            check_count(name, value)
        if gradient_draws < 2:
            raise ValueError("gradient_draws must be at least 2: one draw has no spread")
        if chance is not None and not chance > 0:
            raise ValueError(f"chance is a loss in nats, e.g. math.log(classes), and must be positive, got {chance}")
        self.every, self.chance, self.loss, self.gradient_draws = every, chance, loss, gradient_draws
        self.patience, self.plateau_steps, self.labels = patience, plateau_steps, labels
        self._streaks = dict.fromkeys(diagnostics.CAUSES, 0)  # looks in a row at which a cause was there
        self._warned: list[str] = []
        self._losses: list[Tensor] = []  # since the last look
        self._handles: list[RemovableHandle] = []
        self._look: _Look | None = None
        self._step = -1  # last looked at

    def state_dict(self) -> dict[str, Any]:
        losses = torch.stack(self._losses).tolist() if self._losses else []
        return {"streaks": dict(self._streaks), "warned": list(self._warned), "losses": losses, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._streaks |= state_dict["streaks"]
        self._warned = list(state_dict["warned"])
        self._losses = [torch.tensor(loss, device="cpu") for loss in state_dict.get("losses", ())]
        self._step = state_dict.get("step", -1)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        due = trainer.global_step % self.every == 0 and trainer.global_step != self._step
        if not (due and trainer.is_global_zero):
            return
        kinds = AttentionSampling, NestedAttentionSampling
        sampling = next((layer for layer in pl_module.modules() if isinstance(layer, kinds)), None)
        if sampling is None:
            return
        self._step, self._look = trainer.global_step, _Look(sampling)
        self._handles = [
            sampling.register_forward_hook(self._look.keep_output),
            sampling.feature.register_forward_hook(self._look.keep_features),
        ]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, dict) and "loss" in outputs and trainer.is_global_zero:
            self._losses = [loss.to(pl_module.device) for loss in self._losses]  # some may be from a checkpoint
            self._losses.append(outputs["task_loss" if "task_loss" in outputs else "loss"].detach().float())
        while self._handles:
            self._handles.pop().remove()
        look, self._look = self._look, None
        if look is None or look.output is None or look.features is None:
            return
        metrics = look.measure()
        parameters = [value for value in look.attention_parameters() if value.requires_grad]
        if self.loss is not None and parameters:
            metrics |= self._repeat(trainer, pl_module, batch, look.sampling, parameters)
        for logger in trainer.loggers:
            logger.log_metrics({f"attention/{name}": value for name, value in metrics.items()}, step=self._step)
        loss = float(torch.stack(self._losses).mean()) if self._losses else math.nan
        self._losses = []
        _, logits, sample = look.output
        self._judge(logits, sample, loss, None if self.labels is None else self.labels(batch))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _repeat(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        sampling: nn.Module,
        parameters: list[nn.Parameter],
    ) -> dict[str, float]:
        """What repeated draws of the batch tell."""
        assert self.loss is not None
        loss, generator = self.loss, torch.Generator(pl_module.device).manual_seed(self._step)
        pooled: list[Tensor] = []
        handle = sampling.register_forward_hook(lambda _, __, output: pooled.append(output[0].detach().float()))
        try:
            with evaluating(pl_module), trainer.precision_plugin.forward_context():
                gradients = diagnostics.repeated_gradients(
                    lambda: loss(pl_module, batch, generator), parameters, self.gradient_draws
                )
        finally:
            handle.remove()
        metrics = {"gradient_snr": float(diagnostics.signal_to_noise(gradients.float()))}
        if len(pooled) == self.gradient_draws:  # one draw a loss, so that all are of the same images
            metrics["repeated_error"] = float(diagnostics.repeated_error(torch.stack(pooled)).mean())
        return metrics

    def _judge(self, logits: Tensor, sample: PatchSample | NestedSample, loss: float, labels: Tensor | None) -> None:
        found = diagnostics.warning_signs(
            logits, loss=None if math.isnan(loss) else loss, chance=self.chance, sample=sample, labels=labels
        )
        for cause in self._streaks:
            self._streaks[cause] = self._streaks[cause] + 1 if cause in found else 0
            patience = math.ceil(self.plateau_steps / self.every) if cause == "plateau" else self.patience
            if self._streaks[cause] >= patience and cause not in self._warned:
                self._warned.append(cause)
                steps = self._streaks[cause] * self.every
                text = f"step {self._step}, for {steps} steps: {found[cause]}"
                warnings.warn(text, AttentionWarning, stacklevel=2)


@dataclass
class _Look:
    """What one step shows of a model."""

    sampling: AttentionSampling | NestedAttentionSampling
    output: Any = None
    features: Tensor | None = None

    def measure(self) -> dict[str, float]:
        """The numbers of this look."""
        assert self.features is not None
        if isinstance(self.sampling, NestedAttentionSampling):
            return measure_nested(self.sampling, self.output, self.features)
        return measure_attention(self.sampling, self.output, self.features)

    def attention_parameters(self) -> Iterator[nn.Parameter]:
        """Of the attention networks of all levels."""
        if isinstance(self.sampling, AttentionSampling):
            yield from self.sampling.attention.parameters()
            return
        for depth in range(len(self.sampling.levels)):
            yield from self.sampling.zoom(depth).attention.parameters()

    def keep_output(self, module: nn.Module, inputs: Any, output: Output | NestedOutput) -> None:
        """A forward hook of `sampling`."""
        self.output = output

    def keep_features(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """A forward hook of its feature network."""
        self.features = output.detach()


@torch.no_grad()
def measure_attention(sampling: AttentionSampling, output: Output, features: Tensor) -> dict[str, float]:
    """What one draw of a batch tells: the numbers that are logged at every look.

    Args:
        sampling: the model's.
        output: what it returned.
        features: (B·N, …) what its feature network returned.
    """
    _, logits, sample = output
    log_attention = sample.log_attention.detach()
    random = sampling.selection == "sample"  # the most probable cells are no draw, whose error could be told
    metrics = {
        "effective_patches": diagnostics.effective_sample_size(sample.weights(sampling.estimator)),
        "covered_mass": diagnostics.covered_mass(log_attention, sample.indices),
        "relative_entropy": diagnostics.relative_entropy(sample.entropy, _cells(logits, sample)),
        "peak_mass": diagnostics.peak_mass(logits),
        "border_mass": diagnostics.border_mass(logits, grid_sizes=sample.grid_sizes),
    }
    if random and log_attention.shape[1] > 1:
        features = features.unflatten(0, tuple(log_attention.shape)).flatten(2)  # (B, N, D)
        value, variance = estimate_pooled(features, sample, estimator=sampling.estimator)
        metrics["relative_error"] = variance.sum(-1).sqrt() / value.norm(dim=-1)
    return {name: float(values.mean()) for name, values in metrics.items()}


@torch.no_grad()
def measure_nested(sampling: NestedAttentionSampling, output: NestedOutput, features: Tensor) -> dict[str, float]:
    """What one draw of a batch tells of nested attention: of each level, named level1_… from the outermost on.

    Args:
        sampling: the model's.
        output: what it returned.
        features: (B·N, …) what its feature network returned.
    """
    _, logits, sample = output
    levels = sample.levels
    metrics = {
        f"level{number}_{name}": value
        for number, level in enumerate(diagnostics.by_level(sample, estimator=sampling.estimator), 1)
        for name, value in level.items()
    }
    metrics["level1_peak_mass"] = diagnostics.peak_mass(logits)
    metrics["level1_border_mass"] = diagnostics.border_mass(logits, grid_sizes=levels[0].grid_sizes)
    if sampling.selection == "sample" and min(sample.n) > 1:
        estimator = sampling.estimator if sampling.replace else "unordered"
        drawn = features.unflatten(0, tuple(levels[-1].indices.shape)).flatten(2)  # (R, n, D)
        value, variance, parts = estimate_parts(drawn, levels, estimator=estimator)
        metrics["relative_error"] = variance.sum(-1).clamp(min=0).sqrt() / value.norm(dim=-1)
        for number, part in enumerate(parts.sum(-1) / variance.sum(-1).clamp(min=1e-300), 1):
            metrics[f"level{number}_variance_share"] = part
    return {name: float(values.mean()) for name, values in metrics.items()}


def _cells(logits: Tensor, sample: PatchSample) -> int | Tensor:
    """The number of the grid's, or where images' grids differ, of each image's own that can be drawn."""
    return logits[0].numel() if sample.grid_sizes is None else functional.live_cells(logits)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, in which batch normalisation only reads its statistics."""
    before = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, training in before:
            layer.training = training
