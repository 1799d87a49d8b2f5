"""What a model loses without each head, and what each part of it adds to a token's logit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastgpt.interpret.capture import capture_attention, gpt_of
from fastgpt.interpret.stream import State, after, evaluating, final, log_probability, states
from fastgpt.layers import Branch
from fastgpt.model import GPT
from fastgpt.norms import LayerNorm

ROOM = 2**14  # tokens that go through a block at a time


@torch.no_grad()
def head_ablation(model: nn.Module, idx: Tensor, target: int | None = None) -> Tensor:
    """The loss, in nats, that each head keeps away: loss without the head less loss with it.

    A head's output, its slice of what c_proj takes, is zero at every position. The loss is
    -log p(target) after the last token; without a target the mean over the text's own tokens.

    Args:
        model: a GPT, or a module that holds one.
        idx: (1, T) ids.
        target: the id that is to follow; None is the text itself, T at least 2.

    Returns:
        (n_layer, n_head) float32; a negative number is a head that the model does better without.

    Raises:
        ValueError: idx is not one row, or too short, or the target is not in the vocabulary.

    Michel, Levy and Neubig, Are sixteen heads really better than one?, 2019,
    https://arxiv.org/abs/1905.10650, section 3.2.
    """
    gpt = gpt_of(model)
    _check(gpt, "head_ablation", idx, target)
    c, T = gpt.config, idx.shape[1]
    lost = torch.empty(c.n_layer, c.n_head)
    few = max(1, ROOM // T)
    with evaluating(gpt):
        for layer, state in enumerate(states(gpt, idx)):
            if layer == c.n_layer:
                break
            # The first row keeps all heads: both losses come from the same run.
            kept = 1.0 - torch.eye(c.n_head + 1, c.n_head, device=idx.device).roll(1, 0)
            kept[0] = 1.0
            rows = [torch.cat((kept[:1], part)) for part in kept[1:].split(few)]
            losses = [_loss(gpt, state, layer, some, idx, target) for some in rows]
            lost[layer] = torch.cat([loss[1:] - loss[0] for loss in losses])
    return lost


def _loss(
    gpt: GPT, state: State, layer: int, kept: Tensor, idx: Tensor, target: int | None
) -> Tensor:
    """(n,): with the heads of each row of kept (n, H) at work in one layer."""
    x = _expanded(state, kept.shape[0])
    for n in range(layer, gpt.config.n_layer):
        if n == layer:
            with _heads_kept(gpt, layer, kept[:, None]):
                x = after(gpt, x, n)
        else:
            x = after(gpt, x, n)
    hidden = final(gpt, x)
    if target is not None:
        return -log_probability(gpt.logits(hidden[:, -1]), target).cpu()
    logits = gpt.logits(hidden[:, :-1])
    wide = torch.promote_types(logits.dtype, torch.float32)
    p = logits.to(wide).log_softmax(-1).gather(-1, idx[:, 1:, None].expand(len(kept), -1, 1))
    return -p.mean((1, 2)).cpu()


def _expanded(state: State, n: int) -> State:
    """A stream of one row as one of n."""
    h = state.h.repeat(n, 1, 1)
    if state.branch is None:
        return State(h)
    return State(h, Branch(state.branch.x.repeat(n, 1, 1), state.branch.bias))


@contextmanager
def _heads_kept(gpt: GPT, layer: int, kept: Tensor) -> Iterator[None]:
    """Inside, the outputs of a layer's heads are multiplied by kept (n, T or 1, H)."""

    def mask(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        o = args[0].unflatten(-1, (gpt.config.n_head, -1))  # (n, T, H, D)
        return ((o * kept[..., None].to(o.dtype)).flatten(-2),)

    end: nn.Module = gpt.h[layer].attn.c_proj  # type: ignore[union-attr,assignment]
    handle = end.register_forward_pre_hook(mask)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class DirectLogits:
    """Parts of one logit; all of them sum to it.

    Attributes:
        token, position: of the embedding; a model without learned positions has 0 of them.
        heads: (n_layer, n_head).
        attention_bias, mlp: (n_layer,).
        norm_bias: of ln_f.
        logit: the model's own.
    """

    token: float
    position: float
    heads: Tensor
    attention_bias: Tensor
    mlp: Tensor
    norm_bias: float
    logit: float

    @property
    def sum(self) -> float:
        parts = self.heads.sum() + self.attention_bias.sum() + self.mlp.sum()
        return self.token + self.position + self.norm_bias + float(parts)


@torch.no_grad()
def direct_logits(model: nn.Module, idx: Tensor, target: int) -> DirectLogits:
    """What each part of a GPT adds by itself to the logit of target after the last token.

    The last residual stream is a sum, of the embedding, every head's output through c_proj, and
    every feed-forward. With the divisor of ln_f held at its value, so is the logit:

        logit = sum_c (c - mean(c)) / std * weight . W_target + bias . W_target

    (RMS norm: without the mean and the bias.)

    Args:
        model: a GPT, or a module that holds one.
        idx: (1, T) ids.
        target: an id.

    Raises:
        ValueError: idx is not one row, or the target is not in the vocabulary.

    Elhage et al., A mathematical framework for transformer circuits, 2021,
    https://transformer-circuits.pub/2021/framework, section "Logits and direct effects".
    """
    gpt = gpt_of(model)
    _check(gpt, "direct_logits", idx, target)
    c = gpt.config
    wide = torch.promote_types(gpt.dtype, torch.float32)
    with evaluating(gpt):
        with capture_attention(gpt, rows=-1, keep="o") as captured:
            stream = list(states(gpt, idx))
        last = [state.sum[0, -1].to(wide) for state in stream]
        logit = float(gpt.logits(final(gpt, stream[-1])[:, -1])[0, target])
        heads, bias = [], []
        for layer in range(c.n_layer):
            o = captured[layer].o
            assert o is not None
            # Each head alone, and none of them, which leaves c_proj's bias.
            alone = torch.eye(c.n_head + 1, c.n_head, dtype=o.dtype, device=o.device)
            made = gpt.h[layer].attn.c_proj((alone[..., None] * o[0, :, 0]).flatten(1))  # type: ignore[union-attr,operator]
            made = made.to(wide)
            heads.append(made[:-1] - made[-1])
            bias.append(made[-1])
        norm, x = gpt.ln_f, last[-1]
        towards = gpt.output_weight[target].to(wide)
        gain = towards * norm.weight.to(wide)
        centred = isinstance(norm, LayerNorm)
        eps = norm.eps or 0.0
        x = x - x.mean() if centred else x
        std = torch.sqrt(x.square().mean() + eps)

        def part(t: Tensor) -> Tensor:
            return ((t - t.mean(-1, keepdim=True) if centred else t) @ gain / std).cpu()

        attention = torch.stack([h.sum(0) + b for h, b in zip(heads, bias, strict=True)])
        steps = torch.stack([b - a for a, b in pairwise(last)])
        position = (
            0.0 if gpt.wpe is None else float(part(gpt.wpe.weight[idx.shape[1] - 1].to(wide)))
        )
        shift = norm.bias if isinstance(norm, LayerNorm) else None
        return DirectLogits(
            token=float(part(last[0])) - position, position=position,
            heads=torch.stack([part(h) for h in heads]),
            attention_bias=torch.stack([part(b) for b in bias]), mlp=part(steps - attention),
            norm_bias=0.0 if shift is None else float(shift.to(wide) @ towards), logit=logit,
        )  # fmt: skip


def _check(gpt: GPT, name: str, idx: Tensor, target: int | None) -> None:
    if idx.ndim != 2 or idx.shape[0] != 1 or idx.shape[1] < (2 if target is None else 1):
        need = "at least 2 tokens without a target" if target is None else "a token or more"
        raise ValueError(f"{name}: idx must be (1, T), {need}; got {tuple(idx.shape)}")
    if target is not None and not 0 <= target < gpt.config.vocab_size:
        raise ValueError(
            f"{name}: target must lie in the vocabulary, 0 to {gpt.config.vocab_size - 1};"
            f" got {target}"
        )
