"""torch's own scaled_dot_product_attention on the kernel, for models that call it."""

import warnings
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from fastgpt.ops import backend
from fastgpt.ops.attention import backward_op, forward_op
from fastgpt.ops.attention_checks import attention_obstacle
from fastgpt.ops.attention_reference import Extras, reference, reference_bwd
from fastgpt.ops.dropout import draw_seed

IMPL = "fastgpt"  # its name in torch's registry


def _like(t: Tensor, like: Tensor) -> Tensor:
    """t with the strides that torch promises a compiled graph: those of empty_like."""
    strides = torch.empty_like(like, device="meta").stride()
    return t if t.stride() == strides else torch.empty_like(like).copy_(t)


def _state(seed: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """A seed as the two tensors in which torch keeps its own between forward and backward."""
    if torch.version.hip is not None:
        word = torch.zeros((), dtype=torch.int64, device=q.device)
        return word if seed is None else seed.view(()), word
    words = torch.zeros(2, dtype=torch.int64, device=q.device)
    if seed is not None:
        words[:1] = seed
    return words.view(torch.uint64), words.new_zeros(()).view(torch.uint64)


def forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """aten::_scaled_dot_product_flash_attention, of (B, H, T, D)."""
    if return_debug_mask:
        raise NotImplementedError("register_sdpa: return_debug_mask must be False; got True")
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seed = draw_seed(q.device) if dropout_p > 0.0 else None
    args = (q, k, v, scale, -1, 0 if is_causal else -1, dropout_p, seed)
    why = attention_obstacle(q, k, v, scale, Extras())
    if backend.kernel_chosen("attention", q, why):
        o, lse = forward_op(*args)
    else:
        o, lse = reference(*args, Extras())
    state = _state(seed, q)
    sizes = query.shape[2], key.shape[2]
    out = _like(o.transpose(1, 2), query)
    return out, lse.contiguous(), None, None, *sizes, *state, query.new_empty(0)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float,
    is_causal: bool, philox_seed: Tensor, philox_offset: Tensor, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """aten::_scaled_dot_product_flash_attention_backward -> dq, dk, dv."""
    do, q, k, v, o = (t.transpose(1, 2) for t in (grad_out, query, key, value, out))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seed = philox_seed.reshape(-1)[:1].view(torch.int64) if dropout_p > 0.0 else None
    rest = (scale, -1, 0 if is_causal else -1, dropout_p, seed)
    if attention_obstacle(q, k, v, scale, Extras()) is None:
        dq, dk, dv, _ = backward_op(do, None, q, k, v, o, logsumexp, *rest)
    else:
        dq, dk, dv, _ = reference_bwd(do, None, q, k, v, logsumexp, *rest, Extras())
    dq, dk, dv = (
        _like(d.transpose(1, 2), t)
        for d, t in ((dq, query), (dk, key), (dv, value))
    )  # fmt: skip
    return dq, dk, dv


class Kernels:
    """The two functions in torch's dispatcher, in the place of those of a device.

    Where torch prefers cuDNN's attention it would never ask for them: that is off meanwhile.
    """

    def __init__(self, device: str = "CUDA") -> None:
        self._cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._library = Library("aten", "IMPL", device)
        name = "_scaled_dot_product_flash_attention"
        with warnings.catch_warnings():  # that they replace others is what is wanted
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            self._library.impl(name, forward)
            self._library.impl(f"{name}_backward", backward)

    def remove(self) -> None:
        """Leave the place to those that were there before."""
        self._library._destroy()
        torch.backends.cuda.enable_cudnn_sdp(self._cudnn)


class Hook:
    """What `register_sdpa` returns: leaving it as a context, or remove(), undoes it."""

    def __init__(self) -> None:
        try:
            from torch.nn.attention import (
                activate_flash_attention_impl,
                current_flash_attention_impl,
                register_flash_attention_impl,
                restore_flash_attention_impl,
            )
        except ImportError:
            raise NotImplementedError(
                "register_sdpa: needs torch.nn.attention.register_flash_attention_impl, which"
                f" torch {torch.__version__} has not; call"
                " fastgpt.functional.scaled_dot_product_attention instead"
            ) from None
        self._activate, self._restore = activate_flash_attention_impl, restore_flash_attention_impl
        self._current, self._before = current_flash_attention_impl, current_flash_attention_impl()
        register_flash_attention_impl(IMPL, register_fn=Kernels)
        activate_flash_attention_impl(IMPL)

    def remove(self) -> None:
        """Give torch back what it had before, unless another implementation is active by now."""
        if self._current() != IMPL or self._before == IMPL:
            return
        if self._before is None:
            self._restore()
        else:
            self._activate(self._before)

    def __enter__(self) -> "Hook":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.remove()


def register_sdpa() -> Hook:
    """Let torch's own scaled_dot_product_attention run the kernel wherever it would run flash
    attention: on a GPU, in float16 or bfloat16, with no attn_mask; forward and backward, under
    torch.compile as well.

        fastgpt.functional.register_sdpa()  # from now on, in all models

        with fastgpt.functional.register_sdpa():  # or in here
            loss = model(x).sum()
            loss.backward()

    It is torch.nn.attention's registry of flash attentions that is used, under the name "fastgpt",
    so one is active at a time in a process. cuDNN's attention, which torch prefers on some GPUs, is
    switched off as long. Calls with an attn_mask, or in float32, stay torch's.

    Returns:
        A hook: remove(), or leaving it as a context, gives torch back what it had before.

    Raises:
        NotImplementedError: this torch has no such registry.
    """
    return Hook()
