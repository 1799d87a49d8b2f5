"""GPT, a causal transformer language model, on the fused ops: configuration, model, counts.

    h_t = wte[idx_t] + wpe[t]                        token embedding plus position
    h   = h + attn(ln_1(h)); h = h + mlp(ln_2(h))    n_layer times
    P(idx_{t+1} | idx_1..t) = softmax(ln_f(h_t) wte^T)

attn is causal softmax attention: position t looks at the positions up to t, all at once, with
weights that sum to one; nothing recurs from step to step. The output layer is the embedding wte.

Radford et al., Language models are unsupervised multitask learners, 2019 (GPT-2); Brown et al.,
Language models are few-shot learners, 2020, https://arxiv.org/abs/2005.14165 (GPT-3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.layers import Block, KVCache, LayerNorm
from fastgpt.ops.attention import MAX_HEAD_DIM
from fastgpt.ops.ffn import ACTIVATIONS

IGNORE = -100  # a target that takes no part in the loss, as in torch's cross_entropy

# block_size, vocab_size, n_layer, n_head, n_embd. GPT-2: table 2 of its report, with the head
# dimension 64 of its released weights. GPT-3: Brown et al., table 2.1, where n_embd must be
# n_head times d_head and twice is not: 1.3B has 24 heads of 128 for a width of 2048 (16 here), and
# 13B a width of 5140 for 40 heads of 128 (5120 here). GPT-3's alternating banded sparse attention
# is dense here.
_PRESETS: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (256, 2048, 4, 4, 256),
    "gpt2": (1024, 50257, 12, 12, 768),
    "gpt2-medium": (1024, 50257, 24, 16, 1024),
    "gpt2-large": (1024, 50257, 36, 20, 1280),
    "gpt2-xl": (1024, 50257, 48, 25, 1600),
    "gpt3-125m": (2048, 50257, 12, 12, 768),
    "gpt3-350m": (2048, 50257, 24, 16, 1024),
    "gpt3-760m": (2048, 50257, 24, 16, 1536),
    "gpt3-1.3b": (2048, 50257, 24, 16, 2048),
    "gpt3-2.7b": (2048, 50257, 32, 32, 2560),
    "gpt3-6.7b": (2048, 50257, 32, 32, 4096),
    "gpt3-13b": (2048, 50257, 40, 40, 5120),
    "gpt3-175b": (2048, 50257, 96, 96, 12288),
}
PRESETS = tuple(_PRESETS)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2's smallest.

    Attributes:
        block_size: the longest context, in tokens.
        vocab_size: ids are 0 .. vocab_size - 1.
        n_layer: blocks.
        n_head: attention heads of a block.
        n_embd: width; n_embd / n_head is the head dimension, a multiple of 8, at most 256.
        dropout: probability, in training mode, after the embedding, on attention weights and on
            every branch.
        bias: whether linear layers and layer norms have a bias.
        activation: "gelu_tanh" (GPT-2's), "gelu" or "relu".
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu_tanh"

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"GPTConfig: {name} must be an int; got {value!r}")
            if value < 1:
                raise ValueError(f"GPTConfig: {name} must be at least 1; got {value}")
        if self.n_embd % self.n_head:
            raise ValueError(
                "GPTConfig: n_embd must be a multiple of n_head;"
                f" got n_embd {self.n_embd}, n_head {self.n_head}"
            )
        if (D := self.n_embd // self.n_head) % 8 or D > MAX_HEAD_DIM:
            raise ValueError(
                f"GPTConfig: n_embd / n_head must be a multiple of 8, at most {MAX_HEAD_DIM};"
                f" got {self.n_embd} / {self.n_head} = {D}"
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float):
            raise TypeError(f"GPTConfig: dropout must be a number; got {self.dropout!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"GPTConfig: dropout must lie in [0, 1); got {self.dropout}")
        if not isinstance(self.bias, bool):
            raise TypeError(f"GPTConfig: bias must be True or False; got {self.bias!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"GPTConfig: activation must be one of {', '.join(ACTIVATIONS)};"
                f" got {self.activation!r}"
            )

    @classmethod
    def preset(cls, name: str) -> "GPTConfig":
        """The shape of a known model: one of `PRESETS`, without dropout.

        Raises:
            ValueError: no preset has that name.
        """
        if name not in _PRESETS:
            raise ValueError(
                f"GPTConfig: the preset must be one of {', '.join(PRESETS)}; got {name!r}"
            )
        block_size, vocab_size, n_layer, n_head, n_embd = _PRESETS[name]
        return cls(block_size, vocab_size, n_layer, n_head, n_embd)


class GPT(nn.Module):
    """A causal transformer language model with learned positions and a tied output layer.

    Weights start as GPT-2's: normal with deviation 0.02, those that end a residual branch
    0.02 / sqrt(2 n_layer); biases 0. The state_dict has GPT-2's names (wte, wpe, h.0.ln_1, ...,
    ln_f) and no lm_head, which is wte; linear weights are (out, in).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        C = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.block_size, C)
        self.h = nn.ModuleList(
            Block(C, config.n_head, config.bias, config.dropout, config.activation)
            for _ in range(config.n_layer)
        )
        self.ln_f = LayerNorm(C, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 1:
                nn.init.ones_(p)
            else:
                branch_end = name.endswith("c_proj.weight")
                scale = (2 * self.config.n_layer) ** -0.5 if branch_end else 1.0
                nn.init.normal_(p, std=0.02 * scale)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The final states ln_f(h), on which the output layer works.

        Args:
            idx: (B, T), int64 or int32, ids below vocab_size.
            cache: if given, idx follow the positions that it holds, and are added to it; for
                generation, without gradient.

        Returns:
            (B, T, n_embd).

        Raises:
            TypeError: idx is not int64 or int32.
            ValueError: idx is not (B, T) with T of at least 1 and at most what block_size leaves,
                or an id lies outside the vocabulary (seen on the CPU only: elsewhere the device
                would have to be waited for).
        """
        start = 0 if cache is None else cache.length
        self._check(idx, start)
        T = idx.shape[1]
        tokens = _embed(partial(self.wte, idx), "ids", idx, self.config.vocab_size)
        positions = self.wpe.weight[start : start + T]
        p = self.config.dropout if self.training else 0.0
        h = F.dropout(tokens + positions, p)  # (B, T, C)
        branch: Tensor | None = None
        for layer, block in enumerate(self.h):
            branch, h = block(branch, h, cache, layer)
        if cache is not None:
            cache.length += T
        y: Tensor
        y, _ = self.ln_f(branch, h, p)
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: hidden wte^T, (..., n_embd) -> (..., vocab_size)."""
        return F.linear(hidden, self.wte.weight)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Predict the token after each one: logits, or with targets the mean loss in nats.

        Args:
            idx: (B, T), int64 or int32, ids below vocab_size, T at most block_size.
            targets: (B, T) int64; targets[b, t] is the id that follows idx[b, :t + 1], or -100
                for a position that is to take no part.

        Returns:
            logits (B, T, vocab_size) of the weights' dtype (of autocast's under autocast), or
            the scalar float32 (float64) mean of -log softmax(logits)[target]; nan if no position
            takes part.

        Raises:
            TypeError, ValueError: see `hidden`; the same for targets.
        """
        if targets is not None:
            if targets.shape != idx.shape:
                raise ValueError(
                    "GPT: targets must have idx's shape;"
                    f" got targets {tuple(targets.shape)}, idx {tuple(idx.shape)}"
                )
            if targets.dtype != torch.int64:
                raise TypeError(f"GPT: targets must be int64; got {targets.dtype}")
        logits = self.logits(self.hidden(idx))
        if targets is None:
            return logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = partial(F.cross_entropy, wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        return _embed(loss, "targets", targets, self.config.vocab_size)

    def _check(self, idx: Tensor, start: int) -> None:
        if idx.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"GPT: idx must be int64 or int32; got {idx.dtype}")
        if idx.ndim != 2 or idx.shape[1] == 0:
            raise ValueError(f"GPT: idx must be (B, T) with T at least 1; got {tuple(idx.shape)}")
        if start + idx.shape[1] > self.config.block_size:
            after = f" after {start} in the cache" if start else ""
            raise ValueError(
                f"GPT: the context is at most block_size {self.config.block_size} tokens;"
                f" got {idx.shape[1]}{after}"
            )

    def new_cache(self, batch_size: int, length: int | None = None) -> KVCache:
        """An empty cache for batch_size rows of at most length (block_size) positions."""
        c, weight = self.config, self.wte.weight
        length = c.block_size if length is None else length
        sizes = (c.n_layer, batch_size, length, c.n_head, c.n_embd // c.n_head)
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        return KVCache(*sizes, device=weight.device, dtype=dtype)

    def configure_optimizer(
        self, lr: float, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95)
    ) -> torch.optim.AdamW:
        """Fused AdamW that decays matrices and embeddings, but no bias and no layer norm."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)

    def num_params(self, embeddings: bool = True) -> int:
        """How many parameters there are, the tied output layer counted once.

        Args:
            embeddings: if False, without the token and position embeddings.
        """
        n = sum(p.numel() for p in self.parameters())
        return n if embeddings else n - self.wte.weight.numel() - self.wpe.weight.numel()

    def flops(self, T: int, training: bool = False) -> int:
        """Floating-point operations of the matrix products over one sequence of T tokens.

        A multiply-add is two. The weights take 2 T (12 n_layer C^2 + V C), attention, of which a
        causal model needs T (T + 1) / 2 pairs, 2 n_layer C T (T + 1). Training takes three times
        the forward pass: each product has two in its backward.
        """
        c = self.config
        weights = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
        forward = 2 * T * weights + 2 * c.n_layer * c.n_embd * T * (T + 1)
        return 3 * forward if training else forward


def _embed(look_up: Callable[[], Tensor], name: str, ids: Tensor, vocab_size: int) -> Tensor:
    """look_up(), its IndexError said in this model's words."""
    try:
        return look_up()
    except IndexError:
        kept = ids[ids != IGNORE] if name == "targets" else ids
        low, high = int(kept.min()), int(kept.max())
        raise ValueError(
            f"GPT: {name} must lie in the vocabulary, 0 to {vocab_size - 1};"
            f" got {low if low < 0 else high}"
        ) from None
