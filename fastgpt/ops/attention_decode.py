"""Attention of new tokens to a cache that they are put into: specification, op, public function."""

from typing import Any, Literal, overload

import torch
from einops import einsum, repeat
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.attention import bounds_of
from fastgpt.ops.attention_checks import MAX_HEAD_DIM, check_devices, checked_softcap
from fastgpt.ops.attention_reference import Extras, plain
from fastgpt.ops.library import define, fake, flops, impl

OP = "attention_decode"


def attention_decode_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of `attention_decode`: every row looks at all its room, masked."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left = -1 if window is None else window - 1
    args = q, k_cache, v_cache, lengths, k, v, block_table, scale, left, softcap or 0.0
    o, lse = reference(*args)
    return (o, lse) if return_lse else o


def reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor | None,
    v: Tensor | None, block_table: Tensor | None, scale: float, left: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """No shape depends on what is in lengths, and nothing is read by the host."""
    B, T, H, _ = q.shape
    page_size, device = k_cache.shape[1], q.device
    if block_table is None:
        block_table = torch.arange(B, device=device)[:, None]
    table = block_table.long()
    j = torch.arange(table.shape[1] * page_size, device=device)  # the positions of a row
    t = lengths.long()[:, None] + torch.arange(T, device=device)  # (B, T), of the new ones
    live = lengths[:, None] >= 0
    if k is not None and v is not None:
        fits = live & (t < j.shape[0])
        page = table.gather(1, torch.where(fits, t, 0) // page_size)
        slot = torch.where(fits, page * page_size + t % page_size, -1).flatten()
        slots = torch.arange(k_cache.shape[0] * page_size, device=device)
        taken = slots[:, None] == slot
        for cache, new in ((k_cache, k), (v_cache, v)):
            rows = new.flatten(0, 1)[taken.int().argmax(1)].view(cache.shape)
            cache.copy_(torch.where(taken.any(1).view(*cache.shape[:2], 1, 1), rows, cache))
    held = live & (j < t[:, -1:] + 1)  # (B, S)
    page = torch.where(held, table[:, j // page_size], 0)
    keys, values = (
        repeat(
            torch.where(held[..., None, None], cache[page, j % page_size], 0.0),
            "b s h d -> b s (h g) d", g=H // cache.shape[2],
        ) for cache in (k_cache, v_cache)
    )  # fmt: skip
    see = held[:, None] & (j <= t[..., None])  # (B, T, S)
    if left >= 0:
        see = see & (j >= t[..., None] - left)
    s = einsum(q, keys, "b t h d, b s h d -> b h t s") * scale
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    some = see.any(-1)[:, None]  # of the keys is seen
    s = s.masked_fill(~see[:, None], float("-inf")).masked_fill(~some[..., None], 0.0)
    w = (s.softmax(-1) * some[..., None]).to(values.dtype)
    o = einsum(w, values, "b h t s, b s h d -> b t h d")
    return o, s.logsumexp(-1).masked_fill(~some, float("-inf"))


decode_op = define(
    "attention_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor? k,"
    " Tensor? v, Tensor? block_table, float scale, int left, float softcap, int splits)"
    " -> (Tensor, Tensor)"
)


@impl("attention_decode")
def _attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor | None,
    v: Tensor | None, block_table: Tensor | None, scale: float, left: int, softcap: float,
    splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """left: keys that a query sees before its own, -1 for all; splits: 0 leaves them to us."""
    args = q, k_cache, v_cache, lengths, k, v, block_table, scale, left, softcap
    if backend.runs_kernel(q):
        from fastgpt.kernels.attention_decode import attention_decode

        return attention_decode(*args, splits)
    o, lse = _row_by_row(*args, True) if q.device.type == "cpu" else reference(*args)
    return o.contiguous(), lse.contiguous()


@fake("attention_decode")
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    lse = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=lse)


@flops("attention_decode")
def _(
    q: Any, k_cache: Any, v_cache: Any, lengths: Any, k: Any, v: Any, block_table: Any,
    scale: float, left: int, *_: Any, **named: Any,
) -> int:  # fmt: skip
    """As if every row's room were full: lengths are data."""
    B, T, H, D = q
    S = k_cache[1] * (1 if block_table is None else block_table[1])
    return int(4 * B * T * H * D * (S if left < 0 else min(S, left + 1)))


def _row_by_row(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor | None,
    v: Tensor | None, block_table: Tensor | None, scale: float, left: int, softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a CPU does, which may read the lengths: rows of one length are views of one cache.

    lse is empty unless return_lse.
    """
    B, T, H, _ = q.shape
    held = lengths.tolist()
    page_size = k_cache.shape[1]
    S = page_size * (1 if block_table is None else block_table.shape[1])
    if held and max(held) + T > S:
        raise ValueError(
            f"{OP}: a row has room for {S} positions; got lengths up to {max(held)} and T = {T}"
        )
    groups = [(slice(b, b + 1), n) for b, n in enumerate(held)]
    if block_table is None and held.count(held[0] if held else 0) == B > 0:
        groups = [(slice(0, B), held[0])]
    made: list[tuple[Tensor, Tensor | None]] = []
    for rows, n in groups:
        end = n + T if n >= 0 else 0
        if block_table is None:
            keys, values = k_cache[rows, :end], v_cache[rows, :end]
            if k is not None and v is not None and end:
                keys[:, n:].copy_(k[rows])
                values[:, n:].copy_(v[rows])
        else:
            j = torch.arange(end)
            page, at = block_table[rows.start, j // page_size].long(), j % page_size
            if end and not 0 <= int(page.min()) <= int(page.max()) < k_cache.shape[0]:
                raise ValueError(
                    f"{OP}: pages must be from 0 to {k_cache.shape[0] - 1}; block_table has"
                    f" {int(page.min())} to {int(page.max())} for the {end} positions of row"
                    f" {rows.start}"
                )
            if k is not None and v is not None and end:
                k_cache[page[n:], at[n:]] = k[rows.start]
                v_cache[page[n:], at[n:]] = v[rows.start]
            keys, values = k_cache[page, at][None], v_cache[page, at][None]
        made.append(
            plain(
                q[rows], keys, values, scale, left, 0, 0.0, None, return_lse, Extras(softcap)
            )
        )  # fmt: skip
    none = q.new_empty((0, H, T), dtype=torch.promote_types(q.dtype, torch.float32))
    lses = [none if lse is None else lse for _, lse in made] or [none]
    outs = [o for o, _ in made] or [q.new_empty(q.shape)]
    if len(made) == 1:
        return outs[0], lses[0]
    return torch.cat(outs), torch.cat(lses)


def _obstacle(k_cache: Tensor, v_cache: Tensor) -> str | None:
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return "the kernel takes caches whose D is contiguous: it writes them in place"
    return None


def _said(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str:
    return f"got q {tuple(q.shape)}, caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor | None,
    v: Tensor | None, block_table: Tensor | None, window: int | None, splits: int | None,
) -> None:  # fmt: skip
    if not q.ndim == k_cache.ndim == 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"{OP}: q must be (B, T, H, D), k_cache and v_cache of one shape (B, S, Hkv, D), or"
            f" (pages, page_size, Hkv, D) with block_table; {_said(q, k_cache, v_cache)}"
        )
    B, T, H, D = q.shape
    _, page_size, Hkv, wide = k_cache.shape
    if D != wide or (block_table is None and k_cache.shape[0] != B):
        both = "D" if block_table is not None else "B and D"
        raise ValueError(f"{OP}: q and caches must agree in {both}; {_said(q, k_cache, v_cache)}")
    if Hkv == 0 or H % Hkv:
        raise ValueError(
            f"{OP}: H of q must be a multiple of H of the caches; {_said(q, k_cache, v_cache)}"
        )
    if not 8 <= D <= MAX_HEAD_DIM or D % 8:
        raise ValueError(f"{OP}: D must be a multiple of 8 from 8 to {MAX_HEAD_DIM}; got {D}")
    if (k is None) != (v is None):
        raise ValueError(f"{OP}: k and v must be given both or neither")
    given = {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    for name, t in given.items():
        if t is not None and (t.dtype != q.dtype or not q.dtype.is_floating_point):
            raise TypeError(
                f"{OP}: all must have q's floating dtype; got q {q.dtype}, {name} {t.dtype}"
            )
        if t is not None and name in "kv" and t.shape != (B, T, Hkv, D):
            raise ValueError(
                f"{OP}: {name} must be (B, T, Hkv, D) = {(B, T, Hkv, D)}; got {tuple(t.shape)}"
            )
    for name, t, shape in (("lengths", lengths, (B,)), ("block_table", block_table, (B, None))):
        if t is None:
            continue
        if t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{OP}: {name} must be int32 or int64; got {t.dtype}")
        if t.ndim != len(shape) or t.shape[0] != B:
            form = "(B,)" if name == "lengths" else "(B, pages of a row)"
            raise ValueError(f"{OP}: {name} must be {form}, B = {B}; got {tuple(t.shape)}")
    if block_table is not None and page_size == 0:
        raise ValueError(f"{OP}: a page must have room; {_said(q, k_cache, v_cache)}")
    check_devices(OP, q, **given, lengths=lengths, block_table=block_table)
    if window is not None and window < 1:
        raise ValueError(f"{OP}: window must be at least 1 key; got {window}")
    if splits is not None and splits < 1:
        raise ValueError(f"{OP}: splits must be at least 1; got {splits}")
    if k is not None:
        for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
            if any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True)):
                raise ValueError(f"{OP}: {name} is written, so it must not be expanded")
    if torch.is_grad_enabled():
        for name, t in {"q": q, **given}.items():
            if t is not None and t.requires_grad:
                raise NotImplementedError(
                    f"{OP}: there is no backward, the cache is overwritten; {name} requires grad:"
                    " call it under torch.no_grad(), or detach"
                )


@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor | None = ...,
    v: Tensor | None = ..., *, block_table: Tensor | None = ..., softmax_scale: float | None = ...,
    window: int | None = ..., softcap: float | None = ..., splits: int | None = ...,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k: Tensor | None = ...,
    v: Tensor | None = ..., *, block_table: Tensor | None = ..., softmax_scale: float | None = ...,
    window: int | None = ..., softcap: float | None = ..., splits: int | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of T new tokens to a cache of keys and values, into which theirs are put.

    Query t of row b is at position lengths[b] + t and sees the keys up to its own:
    o = sum_j softmax_j(softmax_scale * q . k_j) v_j, j <= lengths[b] + t. lengths are read on the
    device alone, and nothing that the host chooses depends on them: one CUDA graph of a call
    serves all lengths. It reads 2 * (lengths[b] + T) * Hkv * D elements of a row, each once, or
    window + T - 1 positions of them; beside that only q, o, the new ones, and partial results of
    4 * splits * H * T * (D + 1) bytes, written and read.

    Args:
        q: (B, T, H, D) in float32, float16 or bfloat16; D a multiple of 8, at most 256. T small.
        k_cache, v_cache: (B, S, Hkv, D), H a multiple of Hkv; or (pages, page_size, Hkv, D) with
            block_table. Of any strides with D contiguous. What lies behind a row's last position
            may be anything, NaN too.
        lengths: (B,) int32 or int64: the positions that a row holds before the new ones. With
            lengths[b] + T beyond the room, S, a CPU raises; on a GPU such positions are neither
            written nor seen. A row of negative length is idle: nothing is written, o = 0,
            lse = -inf.
        k, v: (B, T, Hkv, D), written to the positions lengths[b] + t of the cache, by the launch
            that reads them. If None, they are in the cache already.
        block_table: (B, pages of a row) int32 or int64: position j of row b is in page
            block_table[b, j // page_size]. Entries behind a row's last position are not looked at.
            Rows may share pages, but for those that are written.
        softmax_scale: D ** -0.5 if None.
        window: if given, a query sees only the window nearest keys, its own included.
        softcap: if given, a score s becomes softcap * tanh(s / softcap).
        splits: among how many programs a row's keys are divided. If None it follows from the
            shapes and the GPU; a number gives the same bits in batches of any size.
        return_lse: also return the log-sum-exp.

    Returns:
        o: (B, T, H, D) of q's dtype. With return_lse also lse: (B, H, T) float32, as `attention`.

    Raises:
        ValueError: shapes, devices, window, softcap or splits outside these rules.
        TypeError: a dtype outside these rules.
        NotImplementedError: an input requires gradient: there is no backward.

    Dao et al., Flash-Decoding, 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding; pages:
    Kwon et al., PagedAttention, 2023, https://arxiv.org/abs/2309.06180.
    """
    (q,), (k, v) = backend.autocast(q), backend.autocast(k, v)
    softcap = checked_softcap(OP, softcap)
    _check(q, k_cache, v_cache, lengths, k, v, block_table, window, splits)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    left, _ = bounds_of(True, window)
    args = q, k_cache, v_cache, lengths, k, v, block_table, scale, left, softcap
    chosen = backend.kernel_chosen(OP, q, _obstacle(k_cache, v_cache))
    # While tracing, lengths cannot be read: the op stays whole, and reads them when it runs.
    if chosen or (torch.compiler.is_compiling() and not backend.runs_kernel(q)):
        o, lse = decode_op(*args, splits or 0)
    elif q.device.type == "cpu" and not backend.transformed():
        o, lse = _row_by_row(*args, return_lse)
    else:
        o, lse = reference(*args)
    return (o, lse) if return_lse else o
