"""The rules of attention's inputs: what is refused, and what only the kernels do not take."""

import torch
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.attention_reference import Extras

MAX_HEAD_DIM = 256
MAX_ROW_STRIDE = 2**23  # elements: a tile of 256 rows is addressed by int32 within itself


def said(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def check(
    op: str, q: Tensor, k: Tensor, v: Tensor, window: int | None, alibi_slopes: Tensor | None,
    batch: int,
) -> None:  # fmt: skip
    """The rules that attention and attention_varlen share; q, k and v end in (T, H, D)."""
    if k.shape != v.shape:
        raise ValueError(f"{op}: k and v must have one shape; {said(q, k, v)}")
    H, D = q.shape[-2:]
    if k.shape[-2] == 0 or H % k.shape[-2]:
        raise ValueError(f"{op}: H of q must be a multiple of H of k and v; {said(q, k, v)}")
    if not 8 <= D <= MAX_HEAD_DIM or D % 8:
        raise ValueError(f"{op}: D must be a multiple of 8 from 8 to {MAX_HEAD_DIM}; got {D}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise TypeError(
            f"{op}: q, k and v must have one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"{op}: q, k and v must be on one device; got {q.device}, {k.device}, {v.device}"
        )
    if window is not None and window < 1:
        raise ValueError(f"{op}: window must be at least 1 key; got {window}")
    if alibi_slopes is not None:
        if alibi_slopes.dtype != torch.float32:
            raise TypeError(f"{op}: alibi_slopes must be float32; got {alibi_slopes.dtype}")
        if alibi_slopes.shape not in ((H,), (batch, H)):
            raise ValueError(
                f"{op}: alibi_slopes must be (H,) or (B, H) with B = {batch}, H = {H};"
                f" got {tuple(alibi_slopes.shape)}"
            )


def checked_softcap(op: str, softcap: float | None) -> float:
    """The softcap as kernels take it: 0 is none."""
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be positive and finite; got {softcap}")
    return float(softcap or 0.0)


def check_hiding(
    q: Tensor, k: Tensor, bias: Tensor | None, key_mask: Tensor | None,
    document_ids: Tensor | None,
) -> None:  # fmt: skip
    B, Tq, H, _ = q.shape
    Tk = k.shape[1]
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"attention: bias must have a floating dtype; got {bias.dtype}")
        fits = bias.ndim == 4 and bias.shape[3] == Tk
        if not fits or any(
            n not in (1, full) for n, full in zip(bias.shape, (B, H, Tq), strict=False)
        ):
            raise ValueError(
                f"attention: bias must be (B or 1, H or 1, Tq or 1, Tk), here of ({B}, {H}, {Tq},"
                f" {Tk}); got {tuple(bias.shape)}"
            )
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"attention: key_mask must be bool; got {key_mask.dtype}")
        if key_mask.shape != (B, Tk):
            raise ValueError(
                f"attention: key_mask must be (B, Tk) = ({B}, {Tk}); got {tuple(key_mask.shape)}"
            )
    if document_ids is not None:
        if document_ids.is_floating_point() or document_ids.dtype == torch.bool:
            raise TypeError(f"attention: document_ids must be integers; got {document_ids.dtype}")
        if document_ids.shape != (B, Tk) or Tq > Tk:
            raise ValueError(
                f"attention: document_ids must be (B, Tk) = ({B}, {Tk}), with Tq = {Tq} no more"
                f" than Tk; got {tuple(document_ids.shape)}"
            )


def check_devices(op: str, q: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != q.device:
            raise ValueError(f"{op}: {name} must be on q's device {q.device}; got {t.device}")


def attention_obstacle(q: Tensor, k: Tensor, v: Tensor, scale: float, x: Extras) -> str | None:
    """What keeps the kernel from running, beside the device and dtype of q."""
    if scale <= 0.0:
        return f"the kernel takes a positive softmax_scale; got {scale}"
    if (stride := max(q.stride(1), k.stride(1), v.stride(1))) > MAX_ROW_STRIDE:
        return f"the kernel takes strides along T up to {MAX_ROW_STRIDE} elements; got {stride}"
    if x.bias is not None and x.bias.dtype not in backend.KERNEL_DTYPES:
        return f"the kernel takes a float32, float16 or bfloat16 bias; got {x.bias.dtype}"
    if x.alibi_slopes is not None and x.alibi_slopes.requires_grad and torch.is_grad_enabled():
        return "the kernel gives alibi_slopes no gradient"
    return None
