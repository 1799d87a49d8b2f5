"""GPT, a causal transformer language model, on the fused ops: model, loss, counts.

    h_t = wte[idx_t] + wpe[t]                        token embedding plus position
    h   = h + attn(ln_1(h)); h = h + mlp(ln_2(h))    n_layer times
    P(idx_{t+1} | idx_1..t) = softmax(ln_f(h_t) wte^T)

attn is causal softmax attention: position t looks at the positions up to t, all at once, with
weights that sum to one; nothing recurs from step to step. The output layer is the embedding wte.

The variant "llama" has the same blocks on the same stream with other parts: no wpe, but rotary
embedding of q and k in every attention; RMS norm; a gated feed-forward; no biases; and, where they
are asked for, fewer heads of k and v, a norm of q and k, an output layer of its own.

Radford et al., Language models are unsupervised multitask learners, 2019 (GPT-2); Brown et al.,
Language models are few-shot learners, 2020, https://arxiv.org/abs/2005.14165 (GPT-3); Touvron et
al., LLaMA, 2023, https://arxiv.org/abs/2302.13971; Ainslie et al., GQA, 2023,
https://arxiv.org/abs/2305.13245 (grouped queries).
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.cache import KVCache
from fastgpt.config import PRESETS, GPTConfig
from fastgpt.layers import Block, Branch, Documents, Turn, lends, new_norm
from fastgpt.ops import backend
from fastgpt.optim import AdamW, decay_groups
from fastgpt.quantized import Int8Embedding, Int8Linear, Quantized, swap

__all__ = ["GPT", "IGNORE", "PRESETS", "GPTConfig"]
IGNORE = -100
"""A target that takes no part in the loss, as in torch's cross_entropy."""


def places_in(cu_seqlens: Tensor, idx: Tensor) -> Tensor:
    """(B, T) int64: the place of each token in its document, from 0.

    Args:
        cu_seqlens: (n + 1,) where each document of the rows end to end ends, after a 0.
        idx: (B, T).
    """
    at = torch.arange(idx.numel(), device=idx.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, at, right=True) - 1
    return (at - cu_seqlens[document]).view(idx.shape).long()


class GPT(nn.Module):
    """A causal transformer language model: GPT-2's shape, or with variant="llama" Llama's.

    Weights start as GPT-2's: normal with deviation 0.02, those that end a residual branch
    0.02 / sqrt(2 n_layer); biases 0, norms 1. The state_dict has GPT-2's names (wte, wpe, h.0.ln_1,
    ..., ln_f) and no lm_head unless config.tied is False; linear weights are (out, in). The variant
    "llama" has h.0.mlp.gate_proj, up_proj and down_proj, with qk_norm h.0.attn.q_norm and k_norm,
    and no wpe. What config.quantized makes of the weights, `fastgpt.compress` tells.

    Examples:
        >>> model = fastgpt.GPT(fastgpt.GPTConfig(vocab_size=10, n_layer=2, n_head=2, n_embd=16))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model(ids).shape, model(ids[:, :-1], ids[:, 1:]).shape  # logits; the loss
        (torch.Size([1, 3, 10]), torch.Size([]))
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = c = config
        assert c.bias is not None and c.activation is not None  # __post_init__ has set them
        self.wte: nn.Embedding | Int8Embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = None if c.llama else nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.ModuleList(
            Block(
                c.n_embd, c.n_head, c.bias, c.dropout, c.activation, gated=c.llama,
                n_kv_head=c.kv_heads, n_inner=c.inner, qk_norm=c.qk_norm, norm_eps=c.norm_eps,
                recompute=c.recompute, window=c.window, head_dim=c.head_dim,
            )
            for _ in range(c.n_layer)
        )  # fmt: skip
        self.ln_f = new_norm(c.n_embd, c.bias, c.norm_eps, c.llama)
        self.lm_head: nn.Linear | Int8Linear | None = None
        if not c.tied:
            self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        # No buffer: it stays float32 in a model of 16 bits, and is real in one built on "meta".
        self._turns = ops.rotary_table(c.block_size, c.head_dim, c.rope_theta) if c.llama else None
        self.reset_parameters()
        if c.quantized is not None:
            swap(self, c.quantized)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, revision: str | None = None,
        dtype: torch.dtype | None = None, dropout: float = 0.0,
    ) -> "GPT":  # fmt: skip
        """A GPT with weights that transformers, llama.cpp or `save_pretrained` saved.

        Args:
            source: a folder with the config.json and the weights (safetensors, whole or in shards,
                or pytorch_model.bin) of a GPT-2, a Llama or a
                `fastgpt.huggingface.FastGPTForCausalLM`; a .gguf file of a Llama, whose weights
                are dequantised (needs the package gguf); or a model's name on the Hugging Face Hub
                (needs huggingface_hub).
            revision: branch, tag or commit on the Hub.
            dtype: of the weights; if None as they are in the file, bit for bit.
            dropout: the model's; what the file says of it is not read.

        Returns:
            The model on the CPU, in evaluation mode.

        Raises:
            ValueError: it is none of these, or broken, or could not be fetched; another
                architecture, or a part of these that GPT lacks; weights are missing, unknown, or
                of another shape.
            ImportError: gguf or huggingface_hub is needed and not installed.
        """
        from fastgpt.pretrained import from_pretrained

        return from_pretrained(source, revision=revision, dtype=dtype, dropout=dropout)

    def save_pretrained(self, folder: str | os.PathLike[str], *, own: bool = False) -> None:
        """Write config.json and model.safetensors as Hugging Face's GPT-2 or Llama has them.

        transformers' AutoModelForCausalLM.from_pretrained(folder) loads them, and so does
        `from_pretrained`, bit for bit. LoRA is merged on the way. A quantised model's folder
        `from_pretrained` alone loads. Each file is written whole or not at all.

        Args:
            folder: made if it is not there.
            own: write the layout of `fastgpt.huggingface.FastGPTForCausalLM` instead, which has
                every shape; that class and `from_pretrained` load it.

        Raises:
            ValueError: Hugging Face's model has no such shape: a GPT-2 without biases, with fewer
                heads of k and v or with heads pruned, a Llama with qk_norm.
        """
        from fastgpt.pretrained import save_pretrained

        save_pretrained(self, folder, own)

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 1:
                nn.init.ones_(p)
            else:
                branch_end = name.endswith(("c_proj.weight", "down_proj.weight"))
                scale = (2 * self.config.n_layer) ** -0.5 if branch_end else 1.0
                nn.init.normal_(p, std=0.02 * scale)

    def hidden(
        self, idx: Tensor, cache: KVCache | None = None, *, cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:  # fmt: skip
        """The final states ln_f(h), on which the output layer works.

        Args:
            idx: (B, T), int64 or int32, ids below vocab_size.
            cache: if given, idx follow the positions that each of its rows holds, and are added to
                it; for generation, without gradient. `fastgpt.decoder` feeds one.
            cu_seqlens: (n + 1,) int32 or int64, from 0 to B T and not decreasing: if given, the
                rows end to end hold n documents, document i the tokens cu_seqlens[i] ..
                cu_seqlens[i + 1] - 1. Each attends to itself alone, and its positions are from 0
                on. T may then be more than block_size, as long as no document is.
            max_seqlen: tokens of the longest document, or more; min(T, block_size) if None.

        Returns:
            (B, T, n_embd).

        Raises:
            TypeError: idx is not int64 or int32.
            ValueError: idx is not (B, T) with T of at least 1 and at most what block_size leaves,
                or an id lies outside the vocabulary, or cu_seqlens is not as it must be (both seen
                on the CPU only: elsewhere the device would have to be waited for).
        """
        documents = self._documents(idx, cu_seqlens, max_seqlen, cache)
        self._check(idx, 0 if cache is None else cache.length, documents)
        T = idx.shape[1]
        p = self.config.dropout if self.training else 0.0
        start, places = 0, None
        if cache is not None:
            start, places = cache.begin(T, backend.kernels_run(self.ln_f.weight))
        elif documents is not None:
            places = places_in(documents[0], idx)
        h = self._embed(idx, start, p, places)  # (B, T, C)
        turn = self._turn(start, T, places)
        branch: Tensor | Branch | None = None
        kernels = backend.kernels_run(h)
        lend = [kernels and lends(block, Block) for block in self.h]
        for layer, block in enumerate(self.h):
            apart = all(lend[layer : layer + 2])  # it gives, and the next takes
            branch, h = block(branch, h, cache, layer, turn, apart, documents)
        if cache is not None:
            cache.advance(T)
        y: Tensor
        assert branch is not None  # n_layer is at least 1
        last = Branch.of(branch)
        y, _ = self.ln_f(last.x, h, p, last.bias)
        return y

    def _embed(self, idx: Tensor, start: int, p: float, places: Tensor | None) -> Tensor:
        """Tokens, with learned positions where the model has them, those of places or from start
        on: (B, T, C)."""
        wpe = None if self.wpe is None else self.wpe.weight
        try:
            if isinstance(self.wte, Int8Embedding):
                h = self.wte(idx).to(self.dtype)
                if wpe is not None:
                    T = idx.shape[1]
                    h = h + (wpe[start : start + T] if places is None else F.embedding(places, wpe))
                return F.dropout(h, p) if p else h
            if wpe is None or places is None:
                start = 0 if wpe is None else start
                return ops.embedding(idx, self.wte.weight, wpe, start=start, dropout_p=p)
            h = ops.embedding(idx, self.wte.weight) + ops.embedding(places, wpe)
            return F.dropout(h, p) if p else h
        except IndexError:
            raise self.outside(idx) from None

    def outside(self, idx: Tensor) -> ValueError:
        """What to raise for ids that are not all in the vocabulary."""
        low, high = int(idx.min()), int(idx.max())
        return ValueError(
            f"GPT: ids must lie in the vocabulary, 0 to {self.config.vocab_size - 1};"
            f" got {low if low < 0 else high}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GPT":
        """What .to() and .cuda() call; the tables of rotary embedding go along, as float32. So a
        graph that is compiled finds them on its device."""
        super()._apply(fn, recurse)
        device = self.wte.weight.device
        if self._turns is not None and device.type != "meta":
            cos, sin = self._turns
            self._turns = cos.to(device), sin.to(device)
        return self

    def _turn(self, start: int, T: int, places: Tensor | None = None) -> Turn | None:
        """Cosines and sines of places, or of T positions from start on, for rotary embedding."""
        if self._turns is None:
            return None
        cos, sin = self._turns
        if cos.device != self.wte.weight.device:
            cos, sin = (t.to(self.wte.weight.device) for t in (cos, sin))
            self._turns = cos, sin
        if places is not None:
            return F.embedding(places, cos), F.embedding(places, sin)  # (B, T, D / 2)
        return cos[start : start + T], sin[start : start + T]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, or, where these are quantised, of what is computed with them."""
        return self.ln_f.weight.dtype

    @property
    def output_weight(self) -> Tensor:
        """Of the output layer, (vocab_size, n_embd): wte's where it is tied."""
        head = self.wte if self.lm_head is None else self.lm_head
        return head.dequantized(self.dtype) if isinstance(head, Quantized) else head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: hidden output_weight^T, (..., n_embd) -> (..., vocab_size)."""
        head = self.wte if self.lm_head is None else self.lm_head
        if isinstance(head, Quantized):
            return head.product(hidden)
        return F.linear(hidden, self.output_weight)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Predict the token after each one: logits, or with targets the mean loss in nats.

        Args:
            idx: (B, T), int64 or int32, ids below vocab_size, T at most block_size.
            targets: (B, T) int64; targets[b, t] is the id that follows idx[b, :t + 1], or -100
                for a position that is to take no part.
            cu_seqlens, max_seqlen: documents in the rows, each by itself; see `hidden`.

        Returns:
            logits (B, T, vocab_size) of the weights' dtype (of autocast's under autocast), or
            the scalar float32 (float64) mean of -log softmax(logits)[target]; nan if no position
            takes part.

        Raises:
            TypeError, ValueError: see `hidden`; the same for targets.
        """
        if targets is not None:
            self._check_targets(idx, targets)
        cls = type(self)  # FSDP puts what gathers weights around the instance's methods
        hidden = cls.hidden(self, idx, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        if targets is None:
            return cls.logits(self, hidden)
        if self.config.quantized is not None:
            return self._loss(hidden, targets)
        return ops.linear_cross_entropy(hidden, self.output_weight, targets, ignore_index=IGNORE)

    def _check_targets(self, idx: Tensor, targets: Tensor) -> None:
        if targets.shape != idx.shape:
            raise ValueError(
                "GPT: targets must have idx's shape;"
                f" got targets {tuple(targets.shape)}, idx {tuple(idx.shape)}"
            )
        if targets.dtype != torch.int64:
            raise TypeError(f"GPT: targets must be int64; got {targets.dtype}")

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of the logits that the quantised output layer makes, a few rows at a time."""
        total = torch.zeros((), device=hidden.device)
        rows = max(1, 2**24 // self.config.vocab_size)
        flat, at = hidden.flatten(0, 1), targets.flatten()
        for h, t in zip(flat.split(rows), at.split(rows), strict=True):
            logits = self.logits(h).float()
            total = total + F.cross_entropy(logits, t, ignore_index=IGNORE, reduction="sum")
        return total / (at != IGNORE).sum()

    def _check(self, idx: Tensor, start: int, documents: Documents | None) -> None:
        if idx.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"GPT: idx must be int64 or int32; got {idx.dtype}")
        if idx.ndim != 2 or idx.shape[1] == 0:
            raise ValueError(f"GPT: idx must be (B, T) with T at least 1; got {tuple(idx.shape)}")
        longest = idx.shape[1] if documents is None else documents[1]
        if start + longest > self.config.block_size:
            after = f" after {start} in the cache" if start else ""
            raise ValueError(
                f"GPT: the context is at most block_size {self.config.block_size} tokens;"
                f" got {longest}{after}"
            )

    def _documents(
        self, idx: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, cache: KVCache | None
    ) -> Documents | None:
        if cu_seqlens is None:
            if max_seqlen is not None:
                raise ValueError("GPT: max_seqlen needs cu_seqlens; got max_seqlen alone")
            return None
        if cache is not None:
            raise ValueError("GPT: a cache holds one document a row; got cu_seqlens beside it")
        cu = cu_seqlens
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"GPT: cu_seqlens must be int32 or int64; got {cu.dtype}")
        if cu.ndim != 1 or cu.shape[0] < 2:
            raise ValueError(f"GPT: cu_seqlens must be (n + 1,), n from 1; got {tuple(cu.shape)}")
        longest = min(idx.shape[-1], self.config.block_size) if max_seqlen is None else max_seqlen
        if cu.device.type == "cpu" and not torch.compiler.is_compiling():
            lengths = cu.diff()
            if cu[0] != 0 or cu[-1] != idx.numel() or int(lengths.min()) < 0:
                raise ValueError(
                    f"GPT: cu_seqlens must go from 0 to {idx.numel()}, the tokens of idx, and not"
                    f" fall; got {int(cu[0])} to {int(cu[-1])}, steps from {int(lengths.min())}"
                )
            if int(lengths.max()) > longest:
                raise ValueError(
                    f"GPT: max_seqlen must be at least that of the longest document,"
                    f" {int(lengths.max())}; got {longest}"
                )
        return cu, longest

    def new_cache(
        self, batch_size: int, length: int | None = None, *, room: int | None = None
    ) -> KVCache:
        """An empty cache for batch_size rows of at most length (block_size) positions.

        Args:
            room: positions to set aside at first, see `fastgpt.cache.KVCache`.
        """
        weight = self.ln_f.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        c, length = self.config, self.config.block_size if length is None else length
        sizes = (c.n_layer, batch_size, length, self._cached_heads, c.head_dim)
        return KVCache(*sizes, weight.device, dtype, window=c.window, room=room)

    @property
    def _cached_heads(self) -> int:
        """Heads of k and v that are made here."""
        return self.config.kv_heads

    def configure_optimizer(
        self, lr: float, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95),
        **options: Any,
    ) -> AdamW:  # fmt: skip
        """`fastgpt.optim.AdamW` that decays matrices and embeddings, but no bias and no norm.

        Args:
            lr, weight_decay, betas: as AdamW takes them.
            options: AdamW's others, as max_grad_norm.
        """
        return AdamW(decay_groups(self, weight_decay), lr, betas, **options)

    def num_params(self, embeddings: bool = True) -> int:
        """How many parameters there are, the tied output layer counted once.

        Args:
            embeddings: if False, without the token and position embeddings.
        """
        tables = (self.config.vocab_size, 0 if self.wpe is None else self.config.block_size)
        quantized = (m.shape for m in self.modules() if isinstance(m, Quantized))
        n = sum(p.numel() for p in self.parameters()) + sum(N * K for N, K in quantized)
        return n if embeddings else n - sum(tables) * self.config.n_embd

    def flops(self, T: int, training: bool = False) -> int:
        """Those of the matrix products over one sequence of T tokens, see `GPTConfig.flops`."""
        return self.config.flops(T, training)
