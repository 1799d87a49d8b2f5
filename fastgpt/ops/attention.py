"""Scaled dot-product attention: specification, registered ops, gradient, public function."""

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from einops import einsum, reduce, repeat
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.dropout import check_dropout, draw_seed, dropout_mask
from fastgpt.ops.library import define, fake, flops, impl

MAX_HEAD_DIM = 256
MAX_ROW_STRIDE = 2**23  # elements: a tile of 256 rows is addressed by int32 within itself


def visible(Tq: int, Tk: int, left: int, right: int, device: torch.device) -> Tensor:
    """(Tq, Tk) bool: query i sees key j if -left <= j - (i + Tk - Tq) <= right; -1 is no bound."""
    d = torch.arange(Tk, device=device) - torch.arange(Tk - Tq, Tk, device=device)[:, None]
    see = torch.ones_like(d, dtype=torch.bool)
    if left >= 0:
        see &= d >= -left
    if right >= 0:
        see &= d <= right
    return see


def _bounds(causal: bool, window: int | None) -> tuple[int, int]:
    """How far a query sees to the left and to the right of its own position; -1 is no bound."""
    left = -1 if window is None else window - 1
    return left, (0 if causal else left)


def _ref(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    groups = q.shape[2] // k.shape[2]
    k, v = (repeat(t, "b t h d -> b t (h g) d", g=groups) for t in (k, v))
    s = einsum(q, k, "b i h d, b j h d -> b h i j") * scale
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    see = visible(q.shape[1], k.shape[1], left, right, q.device)
    some = see.any(-1, keepdim=True)  # (Tq, 1): a query before the first key sees nothing
    s = s.masked_fill(~see & some, float("-inf"))
    w = s.softmax(-1) * some
    if p > 0.0:
        seed = draw_seed(q.device) if seed is None else seed
        w = w * dropout_mask(seed, tuple(w.shape), p) / (1.0 - p)
    o = einsum(w.to(v.dtype), v, "b h i j, b j h d -> b i h d")
    return o, s.logsumexp(-1).masked_fill(~some[:, 0], float("-inf"))


def _ref_bwd(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
    scale: float, left: int, right: int, p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of _ref written out, as ops below autograd need it: the kernels' formulas."""
    g = q.shape[2] // k.shape[2]
    wide = lse.dtype
    qw, kw, vw = q.to(wide), *(repeat(t.to(wide), "b t h d -> b t (h g) d", g=g) for t in (k, v))
    s = einsum(qw, kw, "b i h d, b j h d -> b h i j") * scale
    see = visible(q.shape[1], k.shape[1], left, right, q.device)
    w = torch.where(see, torch.exp(s - lse[..., None]), 0.0)
    dow = torch.zeros_like(qw) if do is None else do.to(wide)
    dw = einsum(dow, vw, "b i h d, b j h d -> b h i j")
    kept = w
    if p > 0.0 and seed is not None:
        keep = dropout_mask(seed, tuple(w.shape), p) / (1.0 - p)
        kept, dw = w * keep, dw * keep
    delta = (w * dw).sum(-1, keepdim=True)
    ds = w * (dw - delta if dlse is None else dw - delta + dlse.to(wide)[..., None]) * scale
    dq = einsum(ds, kw, "b h i j, b j h d -> b i h d")
    dk = reduce(einsum(ds, qw, "b h i j, b i h d -> b j h d"), "b j (h g) d -> b j h d", "sum", g=g)
    dv = reduce(
        einsum(kept, dow, "b h i j, b i h d -> b j h d"), "b j (h g) d -> b j h d", "sum", g=g
    )
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of `attention`, with the T x T matrix that the kernels never make."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    o, lse = _ref(q, k, v, scale, *_bounds(causal, window), dropout_p, seed)
    return (o, lse) if return_lse else o


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, p: float,
    seed: Tensor | None, return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Plain PyTorch: its own fused attention where that has the same meaning."""
    Tq, Tk = q.shape[1], k.shape[1]
    bounded = left >= 0 or right >= 0
    # torch fills hidden scores with -inf before it scales them: NaN unless the scale is positive.
    unlike = (Tq > Tk and bounded) or scale <= 0.0 or q.numel() == 0 or k.numel() == 0
    if return_lse or unlike or (p > 0.0 and seed is not None):
        return _ref(q, k, v, scale, left, right, p, seed)
    causal = left < 0 and right == 0 and Tq == Tk
    mask = None
    if bounded and not causal and not (Tq == 1 and left < 0):
        mask = visible(Tq, Tk, left, right, q.device)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, dropout_p=p, is_causal=causal, scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return o.transpose(1, 2), None


define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, float scale, int left, int right, float dropout_p,"
    " Tensor? seed) -> (Tensor, Tensor)"
)
define(
    "attention_bwd(Tensor? do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    " float scale, int left, int right, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)"
)


@impl("attention_fwd")
def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend.runs_kernel(q):
        from fastgpt.kernels.attention import attention_fwd

        return attention_fwd(q, k, v, scale, left, right, dropout_p, seed)
    o, lse = _ref(q, k, v, scale, left, right, dropout_p, seed)
    return o.contiguous(), lse


@fake("attention_fwd")
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, H, _ = q.shape
    lse = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=lse)


@impl("attention_bwd")
def _attention_bwd(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    scale: float, left: int, right: int, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if backend.runs_kernel(q):
        from fastgpt.kernels.attention_bwd import attention_bwd

        return attention_bwd(do, dlse, q, k, v, o, lse, scale, left, right, dropout_p, seed)
    return _ref_bwd(do, dlse, q, k, v, lse, scale, left, right, dropout_p, seed)


@fake("attention_bwd")
def _(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    scale: float, left: int, right: int, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def attention_flops(
    q: tuple[int, ...], k: tuple[int, ...], left: int, right: int, matmuls: int
) -> int:
    """Multiply-adds count twice; only (query, key) pairs that see each other count."""
    B, Tq, H, D = q
    Tk = k[1]
    pairs = 0
    for i in range(Tk - Tq, Tk):
        last = Tk - 1 if right < 0 else min(Tk - 1, i + right)
        first = 0 if left < 0 else max(0, i - left)
        pairs += max(0, last - first + 1)
    return matmuls * 2 * B * H * D * pairs


@flops("attention_fwd")
def _(q: Any, k: Any, v: Any, scale: float, left: int, right: int, *_: Any, **__: Any) -> int:
    return attention_flops(q, k, left, right, 2)


@flops("attention_bwd")
def _(
    do: Any, dlse: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, scale: float, left: int,
    right: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return attention_flops(q, k, left, right, 5)


class AttentionFunction(torch.autograd.Function):
    """(q, k, v, ...) -> (o, lse); both carry gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int,
        dropout_p: float, seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        o, lse = torch.ops.fastgpt.attention_fwd(q, k, v, scale, left, right, dropout_p, seed)
        ctx.save_for_backward(q, k, v, o, lse, seed)
        ctx.set_materialize_grads(False)
        ctx.rest = (scale, left, right, dropout_p)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, o, lse, seed = ctx.saved_tensors
        if do is None and dlse is None:
            return (None,) * 8
        scale, left, right, dropout_p = ctx.rest
        if backend.double_backward():
            dq, dk, dv = backend.differentiable_grads(
                lambda q, k, v: _ref(q, k, v, scale, left, right, dropout_p, seed),
                (q, k, v), ctx.needs_input_grad[:3], (do, dlse),
            )  # fmt: skip
        else:
            dq, dk, dv = torch.ops.fastgpt.attention_bwd(do, dlse, q, k, v, o, lse, *ctx.rest, seed)
        return dq, dk, dv, None, None, None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    got = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention: q, k and v must be (B, T, H, D); {got}")
    if k.shape != v.shape:
        raise ValueError(f"attention: k and v must have one shape; {got}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q, k and v must agree in B and D; {got}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: H of q must be a multiple of H of k and v; {got}")
    if not 8 <= q.shape[3] <= MAX_HEAD_DIM or q.shape[3] % 8:
        raise ValueError(
            f"attention: D must be a multiple of 8 from 8 to {MAX_HEAD_DIM}; got {q.shape[3]}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise TypeError(
            "attention: q, k and v must have one floating dtype;"
            f" got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"attention: q, k and v must be on one device; got {q.device}, {k.device}, {v.device}"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1 key; got {window}")


def _obstacle(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    if scale <= 0.0:
        return f"the kernel takes a positive softmax_scale; got {scale}"
    if (stride := max(t.stride(1) for t in (q, k, v))) > MAX_ROW_STRIDE:
        return f"the kernel takes strides along T up to {MAX_ROW_STRIDE} elements; got {stride}"
    return None


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., softmax_scale: float | None = ...,
    window: int | None = ..., dropout_p: float = ..., return_lse: Literal[False] = False,
    seed: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., softmax_scale: float | None = ...,
    window: int | None = ..., dropout_p: float = ..., return_lse: Literal[True],
    seed: Tensor | None = ...,
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
        return_lse: also return the log-sum-exp.
        seed: one int64 on q's device that fixes the dropout mask (see `dropout_mask`); drawn from
            torch's generator if None.

    Returns:
        o: (B, Tq, H, D) of q's dtype. With return_lse also lse: (B, H, Tq) float32, the natural
        log of sum_j exp(softmax_scale * q_i . k_j), which carries gradient too.

    Raises:
        ValueError: shapes, D, device, window or dropout_p outside these rules.
        TypeError: dtypes differ or are not floating.

    Dao, FlashAttention-2, 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2; the formula
    is Vaswani et al., Attention is all you need, 2017, https://arxiv.org/abs/1706.03762, eq. 1.
    """
    _check(q, k, v, window)
    check_dropout("attention", dropout_p, seed)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    left, right = _bounds(causal, window)
    q, k, v = backend.autocast(q, k, v)
    o: Tensor
    lse: Tensor | None
    if backend.kernel_chosen("attention", q, _obstacle(q, k, v, scale)):
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(q.device)
        o, lse = AttentionFunction.apply(q, k, v, scale, left, right, dropout_p, seed)
    else:
        o, lse = _plain(q, k, v, scale, left, right, dropout_p, seed, return_lse)
    return (o, lse) if return_lse and lse is not None else o
