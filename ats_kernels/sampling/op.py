"""Draw cells of an attention map: logits in, draws out.

With ``a = softmax(z)`` over the K cells of a row, cells q_1..q_N are drawn one after the other,

    P(q_k | q_1..q_{k−1}) = a_{q_k} / (1 − Σ_{j<k} a_{q_j})        without replacement (paper, eq. 13-14)
    P(q_k) = a_{q_k}                                               with replacement (paper, eq. 4)

in draw order, which the estimator's weights depend on. On the side come log a of the drawn cells, the
logsumexp of the logits and the entropy ``H = −Σ a log a`` in nats (paper, eq. 21), all differentiable:

    ∂/∂z_i = Σ_k g_k ([i = q_k] − a_i) + g_lse a_i − g_H a_i (log a_i + H)

The drawn indices are constants: how they enter the gradient is the estimator's business (see `expectation`).

How it is drawn, by every backend. Let cell i ring at time E_i / a_i with E_i exponential: the first N cells to ring, in
order, are a draw without replacement (Gumbel top-k in other words: −log of the time is log a_i + Gumbel noise). A block
of cells first rings at E_b / a_b, a_b its total mass, so one random number a block tells which blocks hold the first N,
and only their cells need numbers of their own: drawn as if alone, then, the exponential being memoryless, moved so
that the first of the block rings when the block does (Kool et al., "Stochastic beams", ICML 2019). The random numbers
are functions of seed, row and cell (see `ats_kernels.philox`), what decides the order is computed in float64, and so
the same seed gives the same draws on every device.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ats_kernels.backend import backend_for, check_not_to_onnx, device_guard, is_transformed, may_look, wants_graph
from ats_kernels.checks import check_choice, check_count, check_flag, check_floating, check_generator, compute_dtype
from ats_kernels.pixels import NonFiniteError
from ats_kernels.plausible import check_no_attention
from ats_kernels.sampling.cpu import sample_cpu
from ats_kernels.sampling.draws import METHODS, Draw, Statistics, any_failed, draw_seed
from ats_kernels.sampling.grad_cpu import grad_cpu
from ats_kernels.sampling.reference import draw_cells_ref, drawn_values, grad_again, grad_ref


def _draw(
    logits: Tensor, n: int, replace: bool, method: str, seed: Tensor | None, backend: str
) -> tuple[Draw, Statistics]:
    """The draw, its values in the dtype that comes out, and what its backward needs."""
    if backend == "cpu":
        return sample_cpu(logits, n, replace, method, seed)
    if backend == "triton" and torch.compiler.is_compiling():
        from ats_kernels.sampling.opaque import sample as draw_cells
    elif backend == "triton":
        from ats_kernels.sampling.triton import sample_triton as draw_cells
    else:
        draw_cells = draw_cells_ref
    with device_guard(logits):
        draw, statistics = draw_cells(logits, n, replace, method, seed)
    dtype = compute_dtype(logits.dtype)
    return Draw(draw.indices, *(value.to(dtype) for value in draw[1:])), statistics


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, seed: Tensor | None, how: tuple[int, bool, str, str]
    ) -> tuple[Tensor, ...]:  # as few arguments as can be: each is looked at by several of PyTorch's functions
        n, replace, method, backend = how
        draw, statistics = _draw(logits, n, replace, method, seed, backend)
        ctx.save_for_backward(logits, draw.indices, *statistics)
        ctx.backend, ctx.replace = backend, replace
        ctx.mark_non_differentiable(draw.indices)
        ctx.set_materialize_grads(False)  # zeros would be launches
        return tuple(draw)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None, *arriving: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, indices, *values = ctx.saved_tensors
        statistics = Statistics(*values)
        if ctx.backend == "triton" and not wants_graph():
            return _grad_by_kernels(logits, indices, statistics, arriving, ctx.replace), None, None
        if ctx.backend == "cpu" and not wants_graph():
            return grad_cpu(logits, indices, statistics, arriving), None, None
        dtype = compute_dtype(logits.dtype)
        shapes = (indices.shape, *(2 * [indices.shape[:1]]))
        grads = tuple(
            torch.zeros(shape, dtype=dtype, device=logits.device) if grad is None else grad
            for grad, shape in zip(arriving, shapes, strict=True)
        )
        if wants_graph():
            return grad_again(logits, indices, grads), None, None
        return grad_ref(logits, indices, statistics, grads), None, None


def _grad_by_kernels(
    logits: Tensor, indices: Tensor, statistics: Statistics, grads: tuple[Tensor | None, ...], replace: bool
) -> Tensor:
    if torch.compiler.is_compiling():
        from ats_kernels.sampling.opaque import grad

        return grad(logits, indices, statistics, grads, replace)
    from ats_kernels.sampling.triton import grad_triton

    with device_guard(logits):
        return grad_triton(logits, indices, statistics, grads, replace)


def sample(
    logits: Tensor,
    n: int,
    *,
    replace: bool = False,
    method: str = "sample",
    generator: torch.Generator | None = None,
    validate: bool | None = None,
) -> Draw:
    """Draw `n` cells a row from ``softmax(logits)``, in draw order.

    Args:
        logits: (B, K) floating point; −inf masks a cell. float16 and bfloat16 give float32 results.
        n: cells to draw a row.
        replace: draw with replacement; without is the default.
        method: "sample", or "topk": the n most probable cells, most probable first, no randomness.
        generator: random numbers on the logits' device; torch's default generator where None.
        validate: look at the values, which makes the host wait for the device. None: on the CPU only.

    Returns:
        `Draw`: indices (B, n) int64, log_attention (B, n), logsumexp (B,) and entropy (B,) in nats, the last
        three differentiable with respect to the logits, as often as wanted. Without validation, a row that cannot be
        drawn from comes back with index −1 and NaN everywhere else.

    Raises:
        TypeError: logits that are not floating point, an `n` that is not an int, a `generator` that is none.
        ValueError: logits that are not (B, K); n < 1 or more than can be drawn; an unknown method; "topk" with
            replacement; a generator on another device; with validation also NaN or +inf logits and rows with too few
            unmasked cells.

    Source: paper, section 3.1 (with replacement) and 3.3 (without).
    """
    check_floating("logits", logits)
    n = check_count("n", n)
    _check_most(n)
    check_choice("method", method, METHODS)
    check_flag("replace", replace)
    if logits.ndim != 2 or logits.numel() == 0:
        single = "; a single row needs logits[None]" if logits.ndim == 1 else ""
        mend = "; maps need logits.flatten(1)" if logits.ndim > 2 else single
        raise ValueError(f"logits must be (B, K), both at least 1, got {tuple(logits.shape)}{mend}")
    if method == "topk" and replace:
        raise ValueError(
            "method='topk' takes distinct cells and cannot be combined with replace=True; drop one of them"
        )
    if not replace and n > logits.shape[1]:
        raise ValueError(f"cannot draw n={n} cells without replacement from K={logits.shape[1]}; {_advice(method)}")
    drawn = draw(logits, n, replace=replace, method=method, generator=generator)
    looks = may_look(logits)
    if looks if validate is None else validate:
        if any_failed(drawn.indices, looks=looks):
            _raise_for_bad_rows(logits.detach(), n, replace, method, drawn.indices[:, 0] < 0)
        check_no_attention(logits, drawn.logsumexp)
    return drawn


def draw(logits: Tensor, n: int, *, replace: bool, method: str, generator: torch.Generator | None) -> Draw:
    """`sample` for callers that have checked what it checks, but for the generator and the largest n; no validation."""
    _check_most(n)
    check_generator(generator, logits.device)
    if method == "sample" or torch.jit.is_tracing():
        check_not_to_onnx("the draw of attention sampling")
    if is_transformed():  # nor can it look at values
        try:
            seed = draw_seed(logits, method, generator)
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            raise ValueError(
                "torch.func.vmap must be told how to draw: vmap(…, randomness='different') draws for each entry by "
                "itself, 'same' from the same random numbers"
            ) from error
        indices = draw_cells_ref(logits.detach(), n, replace, method, seed)[0].indices
        dtype = compute_dtype(logits.dtype)
        return Draw(indices, *(value.to(dtype) for value in drawn_values(logits, indices)))
    seed = draw_seed(logits, method, generator)
    backend = "reference" if logits.dtype == torch.float64 and logits.device.type != "cpu" else backend_for(logits)
    if logits.requires_grad and torch.is_grad_enabled():
        return Draw(*_Sample.apply(logits, seed, (n, replace, method, backend)))
    return _draw(logits, n, replace, method, seed, backend)[0]  # an autograd.Function costs as much as few cells do


def _check_most(n: int) -> None:
    if n >= 2**31:
        raise ValueError(f"n must be below 2**31, got {n}")


def _raise_for_bad_rows(logits: Tensor, n: int, replace: bool, method: str, rows: Tensor) -> NoReturn:
    """Raise the error that says why some rows (B,) bool cannot be drawn from."""
    if torch.isnan(logits).any():
        raise NonFiniteError(_first_row("NaN", torch.isnan(logits)) + "; look for a diverged attention network")
    if torch.isposinf(logits).any():
        raise NonFiniteError(_first_row("+inf", torch.isposinf(logits)) + "; only −inf, for a masked cell, is allowed")
    available = (~torch.isneginf(logits)).sum(-1)
    fewest, row = (int(value) for value in available.min(0))
    if fewest == 0:
        raise NonFiniteError(f"logits of row {row} are all −inf: every cell is masked, nothing can be drawn")
    if not replace and fewest < n:
        raise ValueError(
            f"cannot draw n={n} cells without replacement from row {row}: only {fewest} of its "
            f"{logits.shape[1]} cells are not masked; {_advice(method)}"
        )
    raise ValueError(
        f"row(s) {rows.nonzero().flatten().tolist()} of the logits cannot be drawn from, and no cause was found: they "
        f"are finite or masked, and {fewest} cells or more can be drawn. Subtract each row's maximum from the logits "
        "first, and please report this"
    )


def _advice(method: str) -> str:
    return "draw fewer" if method == "topk" else "draw fewer or use replace=True"


def _first_row(what: str, where: Tensor) -> str:
    row, cell = (int(value) for value in where.nonzero()[0])
    return f"logits hold {int(where.sum())} {what} value(s), first in row {row}, cell {cell}"
