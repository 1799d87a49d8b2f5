"""Attention weights of a GPT while it runs as always: same path, same launches, same bits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastgpt.interpret.rows import weights_of_rows
from fastgpt.model import GPT
from fastgpt.ops.watch import Seen, watched

KEPT = ("q", "k", "v", "o")
Chosen = int | Sequence[int] | slice | None


@dataclass(frozen=True)
class Attention:
    """What one call of a layer's attention did, for the heads and rows that were asked for.

    Heads come before positions, so that weights @ v is o, and softmax(scale q k^T) is weights.

    Attributes:
        layer: from 0.
        heads: the h query heads.
        rows: the R queries, counted from 0 in the call: with a cache from the first new position.
        weights: (B, h, R, Tk) float32 (float64 of a float64 model), rows that sum to one. Of
            documents in one row (cu_seqlens) B is 1 and positions count through all of them.
        scale: by which q . k is multiplied.
        q, o: (B, h, R, D), the queries as they met the keys, turned where positions are rotary, and
            each head's weighted sum; None unless kept.
        k, v: (B, h, Tk, D), for each query head those that it reads; None unless kept.
    """

    layer: int
    heads: tuple[int, ...]
    rows: tuple[int, ...]
    weights: Tensor
    scale: float
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    o: Tensor | None = None


@dataclass
class Captured:
    """The calls seen so far, in order; captured[layer] is the one call of a layer."""

    layers: tuple[int, ...]
    n_layer: int
    calls: list[Attention] = field(default_factory=list)

    def __getitem__(self, layer: int) -> Attention:
        found = [call for call in self.calls if call.layer == layer]
        if layer not in self.layers:
            raise ValueError(
                f"capture_attention: the layers asked for are {said(self.layers)}; got {layer}"
            )
        if not found:
            raise ValueError(
                f"capture_attention: layer {layer} made no call; the model must run inside, and not"
                " from a compiled or captured graph"
            )
        if len(found) > 1:
            raise ValueError(
                f"capture_attention: layer {layer} made {len(found)} calls; they are in calls"
            )
        return found[0]


def said(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def chosen(name: str, asked: Chosen, n: int) -> tuple[int, ...]:
    """The numbers from 0 to n - 1 that were asked for; negative ones count from the end.

    Raises:
        ValueError: one of them is not there, or is named twice.
        TypeError: they are no integers.
    """
    if asked is None:
        return tuple(range(n))
    if isinstance(asked, slice):
        return tuple(range(n)[asked])
    numbers = [asked] if isinstance(asked, int) else list(asked)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"capture_attention: {name} must be integers; got {number!r}")
        if not -n <= number < n:
            raise ValueError(
                f"capture_attention: {name} must lie in 0 to {n - 1}, or from -{n} on if counted"
                f" from the end; got {number}"
            )
    found = tuple(number % n for number in numbers)
    if len(set(found)) < len(found):
        raise ValueError(f"capture_attention: {name} must differ; got {said(numbers)}")
    return found


def gpt_of(model: nn.Module) -> GPT:
    """The one GPT that a module is or holds.

    Raises:
        TypeError: there is none, or more than one.
        ValueError: it is compiled.
    """
    found = [module for module in model.modules() if isinstance(module, GPT)]
    if len(found) != 1:
        raise TypeError(
            f"interpret: the model must be or hold one fastgpt.GPT; got {type(model).__name__},"
            f" which holds {len(found)}"
        )
    for module in (model, found[0]):
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError("interpret: a compiled model's inside is not seen; give it uncompiled")
    return found[0]


@contextmanager
def capture_attention(
    model: nn.Module,
    layers: Chosen = None,
    heads: Chosen = None,
    rows: Chosen = -1,
    keep: Sequence[str] = (),
) -> Iterator[Captured]:
    """Inside, the attention weights of a GPT's calls are kept: w = exp(scale q k^T - lse).

    They are made of q, k and the log-sum-exp that the fused kernel leaves, for the rows asked for
    alone, so no T x T matrix comes to be unless rows is None. The model itself takes the path that
    it takes outside, kernel or plain PyTorch, launches what it launches and gives the same bits.
    `fastgpt.generate` runs the model's modules inside, whose every step is a call.

    Args:
        model: a GPT, or a module that holds one.
        layers, heads: numbers from 0, negative ones from the end; all if None.
        rows: queries of each call; the last one, which decides on the next token, unless given;
            all if None.
        keep: of "q", "k", "v", "o" (each head's output) what to keep too, as copies.

    Returns:
        What fills as the model runs; it stays after the context has been left.

    Raises:
        TypeError: the model holds no GPT, or a number is none.
        ValueError: a layer, head or row is not there; the model is compiled.
        NotImplementedError: in the model's call, if its heads are divided over ranks.

    Examples:
        Where the last position looks, (B, H, 1, T):

        >>> model = fastgpt.GPT(fastgpt.GPTConfig.preset("tiny"))
        >>> with fastgpt.capture_attention(model, layers=[0, 3]) as captured:
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        >>> captured[3].weights.shape
        torch.Size([1, 4, 1, 3])

    The lse trick is Dao et al., FlashAttention, 2022, https://arxiv.org/abs/2205.14135, section
    3.1: backward makes the weights again from it.
    """
    gpt = gpt_of(model)
    c = gpt.config
    captured = Captured(chosen("layers", layers, c.n_layer), c.n_layer)
    wanted = chosen("heads", heads, c.n_head)
    if not isinstance(rows, slice | None):
        chosen("rows", rows, c.block_size)
    for name in keep:
        if name not in KEPT:
            raise ValueError(f"capture_attention: keep must be of {', '.join(KEPT)}; got {name!r}")
    running: list[int] = []  # the layer whose attention comes next

    def begins(layer: int) -> Callable[..., None]:
        # The first norm of a block is the one part of it that a hook may watch without the block
        # taking another path.
        return lambda *_: running.__setitem__(slice(None), [layer])

    def see(call: Seen) -> None:
        if not running:
            return  # another model's
        layer = running.pop()
        if layer not in captured.layers:
            return
        if call.q.shape[2] != c.n_head:
            raise NotImplementedError(
                "capture_attention: heads divided over ranks are not put together;"
                f" got {call.q.shape[2]} of {c.n_head}"
            )
        captured.calls.append(_kept(call, layer, wanted, rows, keep))

    with ExitStack() as undo:
        for layer, block in enumerate(gpt.h):
            undo.callback(block.ln_1.register_forward_pre_hook(begins(layer)).remove)  # type: ignore[union-attr]
        undo.enter_context(watched(see))
        yield captured


@torch.no_grad()
def _kept(
    call: Seen, layer: int, heads: tuple[int, ...], rows: Chosen, keep: Sequence[str]
) -> Attention:
    at = chosen("rows", rows, call.q.shape[1])
    group = call.q.shape[2] // call.k.shape[2]
    copies = {}
    for name in keep:
        t: Tensor = getattr(call, name).detach()
        read = list(heads) if name in ("q", "o") else [h // group for h in heads]
        t = t[:, list(at)] if name in ("q", "o") else t
        copies[name] = t[:, :, read].transpose(1, 2).contiguous()
    weights = weights_of_rows(call, heads, at)
    return Attention(layer, heads, at, weights, call.scale, **copies)
