"""Structured pruning: a GPT without the heads and feed-forward columns that matter least.

Column j of the layer that ends a branch (c_proj, down_proj) meets one element of what is inside: of
a head's output, or of the feed-forward's activation. With a gate of 1 on that element,

    dL/dgate_j = sum_i W_ij dL/dW_ij,     importance of a unit = E |sum_{j of unit} dL/dgate_j|,

the first-order estimate of how the loss L changes without the unit, its mean over rows of text. A
unit is a column of the feed-forward, or a head of k and v with the heads of q that look at it.
Without text the importance is the norm of all the unit's weights. Every layer loses equally many.

Michel, Levy, Neubig, Are sixteen heads really better than one?, 2019,
https://arxiv.org/abs/1905.10650, section 4.1 (heads); Molchanov et al., Importance estimation for
neural network pruning, 2019, https://arxiv.org/abs/1906.10771, eq. 8 (gates); Muralidharan et al.,
Compact language models via pruning and knowledge distillation, 2024,
https://arxiv.org/abs/2407.14679 (widths of GPTs, then a short training).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastgpt import lora
from fastgpt.data import DataConfig, Part
from fastgpt.layers import Block, GatedMLP
from fastgpt.model import GPT
from fastgpt.tokenizer import MIN_VOCAB, Tokenizer
from fastgpt.train import (
    BatchConfig,
    EvalConfig,
    OptimConfig,
    ScheduleConfig,
    Step,
    TrainConfig,
    Trainer,
)

WINDOWS = 64  # of text that importance is measured on
MULTIPLE = 32  # what is left of a feed-forward's columns is one of this: int4's groups


def prune(
    model: GPT, share: float = 0.5, rows: Tensor | None = None, *, heads: float | None = None,
    inner: float | None = None,
) -> GPT:  # fmt: skip
    """Remove heads and feed-forward columns, in place: the layers and model.config are smaller.

    What is left of the heads of k and v is rounded up, to one at least, and of the columns to a
    multiple of 32. An optimizer made before has parameters that are no longer the model's.

    Args:
        model: of float weights; LoRA is merged.
        share: of the heads and of the columns to remove, in [0, 1).
        rows: (n, T + 1) int64, ids of text like that it was trained on, T at most block_size; a few
            dozen are enough. If None the norm of the weights decides.
        heads: the share of the heads, where it is another.
        inner: the share of the columns, where it is another.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: a share lies outside [0, 1), the weights are quantised, or rows do not fit.
    """
    heads, inner = (share if s is None else s for s in (heads, inner))
    for s in (heads, inner):
        if not 0.0 <= s < 1.0:
            raise ValueError(f"prune: a share must lie in [0, 1); got {s}")
    c = model.config
    if c.quantized is not None:
        raise ValueError(f"prune: the model must have float weights; it has {c.quantized}")
    if any(lora.layers(model)):
        lora.merge(model)
    model.eval()
    scores = norms(model) if rows is None else importance(model, rows)
    kv = max(1, math.ceil(c.kv_heads * (1.0 - heads) - 1e-9))
    F = math.ceil(c.inner * (1.0 - inner) / MULTIPLE - 1e-9) * MULTIPLE
    F = min(c.inner, F)
    with torch.no_grad():
        for block, (of_heads, of_columns) in zip(model.h, scores, strict=True):
            assert isinstance(block, Block)
            _cut_heads(block, _best(of_heads, kv), c.head_dim)
            _cut_columns(block, _best(of_columns, F))
    H = kv * (c.n_head // c.kv_heads)
    model.config = replace(
        c, n_head=H, n_kv_head=None if c.n_kv_head is None else kv, n_inner=F,
        n_head_dim=None if H * c.head_dim == c.n_embd else c.head_dim,
    )  # fmt: skip
    return model


def importance(model: GPT, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each block that of its heads of k and v, (n_kv_head,), and of the columns of its
    feed-forward, (n_inner,), both float32, by the gradients of rows of text: see above.

    Args:
        model: in evaluation mode.
        rows: (n, T + 1) int64.

    Raises:
        ValueError: rows are not so, or longer than the context.
    """
    T = model.config.block_size
    if rows.ndim != 2 or rows.shape[0] < 1 or not 2 <= rows.shape[1] <= T + 1:
        raise ValueError(
            f"prune: rows must be (n, T + 1), n at least 1, T from 1 to {T};"
            f" got {tuple(rows.shape)}"
        )
    ends = [end for block in model.h for end in _ends(block)]
    weights = [end.weight for end in ends]
    learned = [w.requires_grad for w in weights]
    kv = model.config.kv_heads
    units = [kv if n % 2 == 0 else w.shape[1] for n, w in enumerate(weights)]
    total = [torch.zeros(n, device=w.device) for n, w in zip(units, weights, strict=True)]
    try:
        for w in weights:
            w.requires_grad_()
        for row in rows.to(weights[0].device):
            with torch.enable_grad():
                loss = model(row[None, :-1], row[None, 1:])
                grads = torch.autograd.grad(loss, weights)
            for seen, w, g in zip(total, weights, grads, strict=True):
                gates = (w.detach().float() * g.float()).sum(0)
                seen += gates.view(seen.shape[0], -1).sum(1).abs()
    finally:
        for w, was in zip(weights, learned, strict=True):
            w.requires_grad_(was)
    return [(total[n] / len(rows), total[n + 1] / len(rows)) for n in range(0, len(total), 2)]


@torch.no_grad()
def norms(model: GPT) -> list[tuple[Tensor, Tensor]]:
    """The same without text: the Euclidean norm of all weights and biases of a unit."""
    kv = model.config.kv_heads
    found = []
    for block in model.h:
        assert isinstance(block, Block)
        attn_end, mlp_end = _ends(block)
        rows = _squares(block.attn.c_attn, 1).split(
            [attn_end.in_features, *[model.config.head_dim * kv] * 2]
        )
        heads = sum(t.view(kv, -1).sum(1) for t in (*rows, _squares(attn_end, 0)))
        columns = sum(_squares(m, 1) for m in _begins(block)) + _squares(mlp_end, 0)
        assert isinstance(heads, Tensor)
        found.append((heads.sqrt(), columns.sqrt()))
    return found


def windows(part: Part, T: int) -> Tensor:
    """(n, T + 1) int64: at most 64 rows of a text, from all over it, for `prune`.

    Raises:
        ValueError: the text is shorter than one.
    """
    many = (len(part) - 1) // T
    if many < 1:
        raise ValueError(
            f"prune: the text must be longer than the context, {T} tokens; got {len(part)}"
        )
    n = min(WINDOWS, many)
    starts = [i * many // n * T for i in range(n)]
    return torch.stack([torch.from_numpy(part.read(s, s + T + 1)[0].astype(int)) for s in starts])


def heal(
    model: GPT, text: Part, steps: int, *, lr: float = 3e-4, rows: int = 8, seed: int = 0,
    packing: str = "concat", on_step: Callable[[Step], None] = lambda made: None,
) -> GPT:  # fmt: skip
    """Train a pruned model a little on text, in place, by `fastgpt.train`'s loop.

    The weights are float32 meanwhile, where the model lies, products in bfloat16 where the device
    has it; the learning rate rises over a tenth of the steps and falls by half a cosine.

    Args:
        model: of float weights.
        text: ids, as `Part.of([ids])` makes it, longer than the context.
        steps: optimizer steps.
        lr: the highest learning rate.
        rows: windows of block_size tokens a step.
        seed: of their order.
        packing: "concat" or "documents", as `fastgpt.data.DataConfig` has it.
        on_step: told of every step.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: the text is too short, a number is out of its range, the weights are quantised.
        FloatingPointError: see `fastgpt.train.Trainer.fit`.
    """
    if model.config.quantized is not None:
        raise ValueError(
            f"heal: the model must have float weights; it has {model.config.quantized}"
        )
    if packing == "concat" and len(text) <= model.config.block_size:
        raise ValueError(
            f"heal: the text must be longer than the context, {model.config.block_size} tokens;"
            f" got {len(text)}"
        )
    dtype, device = model.dtype, model.ln_f.weight.device
    config = TrainConfig(
        seed=seed, steps=steps, device=str(device), batch=BatchConfig(rows=rows),
        data=DataConfig(packing=packing),
        optim=OptimConfig(lr=lr), schedule=ScheduleConfig(warmup=steps // 10),
        eval=EvalConfig(every=0, windows=1),
    )  # fmt: skip
    # Only ids come and go, so that any tokenizer does.
    tokenizer = Tokenizer.train([""], MIN_VOCAB)
    trainer = Trainer(config, model.float(), tokenizer, text, text)
    trainer.fit(on_step=on_step)
    return model.to(dtype).eval()


def _ends(block: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The layers that end the two branches."""
    assert isinstance(block, Block)
    mlp = block.mlp
    return block.attn.c_proj, mlp.down_proj if isinstance(mlp, GatedMLP) else mlp.c_proj


def _begins(block: Block) -> tuple[nn.Linear, ...]:
    """The layers that begin the feed-forward."""
    mlp = block.mlp
    return (mlp.gate_proj, mlp.up_proj) if isinstance(mlp, GatedMLP) else (mlp.c_fc,)


def _squares(layer: nn.Linear, dim: int) -> Tensor:
    """Sums of the squares of a layer's weights over a dimension; over 1 with the bias's."""
    made = layer.weight.float().square().sum(dim)
    return made if dim == 0 or layer.bias is None else made + layer.bias.float().square()


def _best(scores: Tensor, n: int) -> Tensor:
    """(n,) the places of the n largest, in their order."""
    return scores.topk(n).indices.sort().values


def _cut_heads(block: Block, kept: Tensor, D: int) -> None:
    attn = block.attn
    H, kv = attn.n_head, attn.n_kv_head
    within = torch.arange(H // kv, device=kept.device)
    q = (kept[:, None] * (H // kv) + within).flatten()
    heads = torch.cat([q, H + kept, H + kv + kept])
    element = torch.arange(D, device=kept.device)
    _cut(attn.c_attn, 0, (heads[:, None] * D + element).flatten())
    _cut(attn.c_proj, 1, (q[:, None] * D + element).flatten())
    attn.n_head, attn.n_kv_head = len(q), len(kept)


def _cut_columns(block: Block, kept: Tensor) -> None:
    for layer in _begins(block):
        _cut(layer, 0, kept)
    _cut(_ends(block)[1], 1, kept)


def _cut(layer: nn.Linear, dim: int, kept: Tensor) -> None:
    """Leave a layer the kept rows (dim 0) or columns (dim 1)."""
    weight = layer.weight
    layer.weight = nn.Parameter(weight.index_select(dim, kept), weight.requires_grad)
    if dim == 0 and (bias := layer.bias) is not None:
        layer.bias = nn.Parameter(bias[kept], bias.requires_grad)
    layer.out_features, layer.in_features = layer.weight.shape
