"""Scaled dot-product attention: specification, registered ops, gradient, public function."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.attention_checks import (
    attention_obstacle,
    check,
    check_devices,
    check_hiding,
    checked_softcap,
    said,
)
from fastgpt.ops.attention_reference import Extras, plain, reference, reference_bwd
from fastgpt.ops.dropout import check_dropout, draw_seed
from fastgpt.ops.library import define, fake, flops, impl
from fastgpt.ops.watch import tell

BIAS = 8 + Extras._fields.index("bias")  # its place among AttentionFunction's inputs


def bounds_of(causal: bool, window: int | None) -> tuple[int, int]:
    """How far a query sees to the left and to the right of its own position; -1 is no bound."""
    left = -1 if window is None else window - 1
    return left, (0 if causal else left)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of `attention`, with the T x T matrix that the kernels never make."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    extras = Extras(softcap or 0.0, alibi_slopes, bias, key_mask, document_ids)
    o, lse = reference(q, k, v, scale, *bounds_of(causal, window), dropout_p, seed, extras)
    return (o, lse) if return_lse else o


_EXTRAS = (
    "float softcap=0.0, Tensor? alibi_slopes=None, Tensor? bias=None, Tensor? key_mask=None,"
    " Tensor? document_ids=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
    " SymInt max_seqlen_q=0, SymInt max_seqlen_k=0"
)
forward_op = define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, float scale, int left, int right, float dropout_p,"
    f" Tensor? seed, {_EXTRAS}) -> (Tensor, Tensor)"
)
backward_op = define(
    "attention_bwd(Tensor? do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    f" float scale, int left, int right, float dropout_p, Tensor? seed, {_EXTRAS},"
    " bool bias_grad=False, bool packed=False) -> (Tensor, Tensor, Tensor, Tensor)"
)


@impl("attention_fwd")
def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, dropout_p: float,
    seed: Tensor | None, *extras: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend.runs_kernel(q):
        from fastgpt.kernels.attention import attention_fwd

        return attention_fwd(q, k, v, scale, left, right, dropout_p, seed, *extras)
    o, lse = reference(q, k, v, scale, left, right, dropout_p, seed, Extras(*extras))
    return o.contiguous(), lse.contiguous()


@fake("attention_fwd")
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, dropout_p: float,
    seed: Tensor | None, *extras: Any, **named: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, H, _ = q.shape
    lse = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=lse)


@impl("attention_bwd")
def _attention_bwd(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    scale: float, left: int, right: int, dropout_p: float, seed: Tensor | None,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, bias: Tensor | None = None,
    key_mask: Tensor | None = None, document_ids: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0,
    max_seqlen_k: int = 0, bias_grad: bool = False, packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dq, dk, dv, dbias (empty unless bias_grad); if packed, the first three as one in the place
    of dq, and the others empty."""
    extras = Extras(
        softcap, alibi_slopes, bias, key_mask, document_ids, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    if backend.runs_kernel(q):
        from fastgpt.kernels.attention_bwd import attention_bwd

        return attention_bwd(
            do, dlse, q, k, v, o, lse, scale, left, right, dropout_p, seed, *extras, bias_grad,
            packed,
        )  # fmt: skip
    grads = reference_bwd(do, dlse, q, k, v, lse, scale, left, right, dropout_p, seed, extras)
    if packed:
        grads = torch.cat(grads[:3], 2), q.new_empty(0), q.new_empty(0), grads[3]
    return grads if bias_grad else (*grads[:3], (q if bias is None else bias).new_empty(0))


@fake("attention_bwd")
def _(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    scale: float, left: int, right: int, dropout_p: float, seed: Tensor | None,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, bias: Tensor | None = None,
    key_mask: Tensor | None = None, document_ids: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0,
    max_seqlen_k: int = 0, bias_grad: bool = False, packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = q if bias is None else bias
    dbias = like.new_empty(like.shape if bias_grad else 0)
    if packed:
        B, T, H, D = q.shape
        dqkv = q.new_empty((B, T, H + 2 * k.shape[2], D))
        return dqkv, q.new_empty(0), q.new_empty(0), dbias
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _before(x: int, n: int) -> int:
    """The sum of min(max(y, 0), n) over all y < x."""
    inside = min(max(x, 0), n)
    return inside * (inside - 1) // 2 + n * max(0, x - n)


def attention_flops(
    q: tuple[int, ...], k: tuple[int, ...], left: int, right: int, matmuls: int
) -> int:
    """Multiply-adds count twice; only (query, key) pairs that see each other count.

    key_mask and document_ids, which are data, are not looked at.
    """
    B, Tq, H, D = q
    Tk = k[1]
    # A query at t sees the keys below t + right + 1 but for those below t - left.
    first = Tk - Tq
    upto = Tq * Tk if right < 0 else _before(Tk + right + 1, Tk) - _before(first + right + 1, Tk)
    below = 0 if left < 0 else _before(Tk - left, Tk) - _before(first - left, Tk)
    return matmuls * 2 * B * H * D * (upto - below)


def _flops(q: Any, k: Any, left: int, right: int, matmuls: int, extras: tuple[Any, ...]) -> int:
    """Sequences end to end count as if all were equally long: their lengths are data."""
    cu_seqlens = Extras(*extras[: len(Extras._fields)]).cu_seqlens_q
    if cu_seqlens is not None:
        B = max(1, cu_seqlens[0] - 1)  # type: ignore[operator]
        q, k = ((B, -(-t[1] // B), *t[2:]) for t in (q, k))
    return attention_flops(q, k, left, right, matmuls)


@flops("attention_fwd")
def _(
    q: Any, k: Any, v: Any, scale: float, left: int, right: int, dropout_p: float, seed: Any,
    *extras: Any, **_: Any,
) -> int:  # fmt: skip
    return _flops(q, k, left, right, 2, extras)


@flops("attention_bwd")
def _(
    do: Any, dlse: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, scale: float, left: int,
    right: int, dropout_p: float, seed: Any, *extras: Any, **_: Any,
) -> int:  # fmt: skip
    return _flops(q, k, left, right, 5, extras)


def unpacked(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H + 2 Hkv, D) -> q, k, v, views."""
    heads = (qkv.shape[2] - n_head) // 2
    q, k, v = qkv.split([n_head, heads, heads], 2)
    return q, k, v


class AttentionFunction(torch.autograd.Function):
    """(q, k, v, ..., extras) -> (o, lse); both carry gradient, as does the bias of the extras.

    (qkv, n_head, None, ...) is the same of one packed tensor, with one packed gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | int | None, v: Tensor | None, scale: float, left: int,
        right: int, dropout_p: float, seed: Tensor | None, *extras: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.n_head, k = (k, None) if isinstance(k, int) else (None, k)
        parts = (q, k, v) if ctx.n_head is None else unpacked(q, ctx.n_head)
        o, lse = forward_op(*parts, scale, left, right, dropout_p, seed, *extras)
        ctx.save_for_backward(q, k, v, o, lse, seed, *extras[1:7])
        ctx.set_materialize_grads(False)
        ctx.rest = (scale, left, right, dropout_p)
        # A default of Extras would be a symbol to dynamo, made here and not found by the next call.
        ctx.sizes = (extras[0], *extras[7:]) if extras else (0.0,)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, o, lse, seed, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if do is None and dlse is None:
            return (None,) * len(needs)
        scale, left, right, dropout_p = ctx.rest
        x = Extras(*ctx.sizes[:1], *tensors, *ctx.sizes[1:])
        bias_grad = len(needs) > BIAS and needs[BIAS]
        n_head = ctx.n_head
        grads: tuple[Tensor | None, ...]
        if backend.double_backward():

            def again(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
                parts = (q, k, v) if n_head is None else unpacked(q, n_head)
                extras = x._replace(bias=bias)
                return reference(*parts, scale, left, right, dropout_p, seed, extras)

            grads = backend.differentiable_grads(
                again, (q, k, v, x.bias), (*needs[:3], bias_grad), (do, dlse)
            )
        else:
            parts = (q, k, v) if n_head is None else unpacked(q, n_head)
            packed = n_head is not None
            grads = backward_op(do, dlse, *parts, o, lse, *ctx.rest, seed, *x, bias_grad, packed)
        first = grads[:3] if n_head is None else (grads[0], None, None)
        dbias = grads[3] if bias_grad else None
        return (*first, *(dbias if n == BIAS else None for n in range(3, len(needs))))


def run(
    op: str, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: tuple[int, int],
    dropout_p: float, seed: Tensor | None, return_lse: bool, x: Extras, qkv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Kernel or plain PyTorch -> o, lse; lse may be None unless return_lse. With qkv, q, k and v
    are its views."""
    o: Tensor
    lse: Tensor | None
    if backend.kernel_chosen(op, q, attention_obstacle(q, k, v, scale, x)):
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(q.device)
        # A plain call passes none of them: what is not passed costs no time.
        extras = x if x.softcap or any(t is not None for t in x[1:7]) else ()
        inputs = (q, k, v) if qkv is None else (qkv, q.shape[2], None)
        args = backend.traceable(*inputs, scale, *bounds, dropout_p, seed, *extras)
        o, lse = AttentionFunction.apply(*args)
    else:
        o, lse = plain(q, k, v, scale, *bounds, dropout_p, seed, return_lse, x)
    tell(q, k, v, o, lse, scale, *bounds, x)
    return o, lse


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., softmax_scale: float | None = ...,
    window: int | None = ..., dropout_p: float = ..., softcap: float | None = ...,
    alibi_slopes: Tensor | None = ..., bias: Tensor | None = ..., key_mask: Tensor | None = ...,
    document_ids: Tensor | None = ..., return_lse: Literal[False] = False,
    seed: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., softmax_scale: float | None = ...,
    window: int | None = ..., dropout_p: float = ..., softcap: float | None = ...,
    alibi_slopes: Tensor | None = ..., bias: Tensor | None = ..., key_mask: Tensor | None = ...,
    document_ids: Tensor | None = ..., return_lse: Literal[True], seed: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention: o_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j over the keys i sees.

    The weights of a query are non-negative and sum to one (before dropout). A causal query i of
    Tq sees the keys j <= i + Tk - Tq: the last query sees the last key (bottom-right aligned).
    A query that sees no key gives o = 0 and lse = -inf.

    Args:
        q: (B, Tq, H, D) in float32, float16 or bfloat16; D a multiple of 8, at most 256. Any
            strides: the views of a packed qkv are read in place.
        k, v: (B, Tk, Hkv, D), H a multiple of Hkv (grouped-query attention: query head h reads
            head h // (H // Hkv)).
        causal: whether a query is kept from seeing later keys.
        softmax_scale: D ** -0.5 if None.
        window: if given, a query sees only the window nearest keys on each side, its own position
            included: j > i + Tk - Tq - window, and j < i + Tk - Tq + window if not causal.
        dropout_p: probability in [0, 1) of dropping a weight; the others are divided by 1 - p.
        softcap: if given, a score s becomes softcap * tanh(s / softcap) (Gemma Team, Gemma 2,
            2024, https://arxiv.org/abs/2408.00118, section 2), before anything is added to it.
        alibi_slopes: (H,) or (B, H) float32; adds -slope * |i + Tk - Tq - j| to a score (Press et
            al., Train short, test long, 2021, https://arxiv.org/abs/2108.12409). The kernel gives
            them no gradient; where they ask for one, the reference runs.
        bias: (B or 1, H or 1, Tq or 1, Tk) of any floating dtype and strides, added to the scores;
            -inf hides a key, and a query whose logits all lie below -1e30 sees none, to the
            kernel. It gets a gradient, of its own shape, for two products more.
        key_mask: (B, Tk) bool, True where a key may be seen. What is in the others, NaN too,
            reaches neither output nor gradients.
        document_ids: (B, Tk) integers, in any order; a query sees only keys of its own document.
            Query i is at position i + Tk - Tq, so Tq <= Tk. Blocks of keys are skipped by the
            least and greatest id of each 64 positions.
        return_lse: also return the log-sum-exp.
        seed: one int64 on q's device that fixes the dropout mask (see `dropout_mask`); drawn from
            torch's generator if None.

    Returns:
        o: (B, Tq, H, D) of q's dtype. With return_lse also lse: (B, H, Tq) float32, the natural
        log of sum_j exp(softmax_scale * q_i . k_j), which carries gradient too.

    Raises:
        ValueError: shapes, D, device, window, softcap or dropout_p outside these rules.
        TypeError: a dtype outside these rules.

    Examples:
        With equal scores a position takes the mean of itself and those before:

        >>> q = k = torch.zeros(1, 3, 1, 8)
        >>> v = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1).expand(1, 3, 1, 8)
        >>> fastgpt.ops.attention(q, k, v)[0, :, 0, 0]
        tensor([1.0000, 1.5000, 3.0000])

    Dao, FlashAttention-2, 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2; the formula
    is Vaswani et al., Attention is all you need, 2017, https://arxiv.org/abs/1706.03762, eq. 1.
    """
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention: q, k and v must be (B, T, H, D); {said(q, k, v)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q, k and v must agree in B and D; {said(q, k, v)}")
    q, k, v = backend.autocast(q, k, v)
    softcap = checked_softcap("attention", softcap)
    extras = Extras(softcap, alibi_slopes, bias, key_mask, document_ids)
    o, lse = _attend(q, k, v, causal, softmax_scale, window, dropout_p, seed, return_lse, extras)
    return (o, lse) if return_lse and lse is not None else o


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float | None, window: int | None,
    dropout_p: float, seed: Tensor | None, return_lse: bool, x: Extras, qkv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What attention and attention_packed share: the checks beyond those of shape, and the run."""
    op = "attention"
    check(op, q, k, v, window, x.alibi_slopes, q.shape[0])
    check_hiding(q, k, x.bias, x.key_mask, x.document_ids)
    check_devices(
        op, q, alibi_slopes=x.alibi_slopes, bias=x.bias, key_mask=x.key_mask,
        document_ids=x.document_ids,
    )  # fmt: skip
    check_dropout(op, dropout_p, seed)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    bounds = bounds_of(causal, window)
    return run(op, q, k, v, scale, bounds, dropout_p, seed, return_lse, x, qkv)


def attention_packed(
    qkv: Tensor,
    n_head: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """`attention` of q, k and v that lie in one tensor, as one product makes them.

    The same as of its views. But backward writes the gradient as one tensor too, where those of
    three views would have to be put together.

    Args:
        qkv: (B, T, H + 2 Hkv, D): the heads of q, then those of k, then those of v.
        n_head: H, a multiple of Hkv.
        causal, softmax_scale, window, dropout_p, softcap, alibi_slopes, bias, key_mask,
            document_ids, seed: as in `attention`.

    Returns:
        o: (B, T, H, D) of qkv's dtype.

    Raises:
        ValueError, TypeError: as `attention`; qkv's shape.
    """
    if qkv.ndim != 4 or not 0 < n_head < qkv.shape[2] or (qkv.shape[2] - n_head) % 2:
        raise ValueError(
            "attention_packed: qkv must be (B, T, H + 2 Hkv, D) with H = n_head;"
            f" got qkv {tuple(qkv.shape)}, n_head {n_head}"
        )
    (qkv,) = backend.autocast(qkv)
    softcap = checked_softcap("attention_packed", softcap)
    extras = Extras(softcap, alibi_slopes, bias, key_mask, document_ids)
    o, _ = _attend(
        *unpacked(qkv, n_head), causal, softmax_scale, window, dropout_p, seed, False, extras, qkv
    )
    return o
