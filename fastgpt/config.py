"""The shape of a GPT: one frozen dataclass, checked when made, and the shapes of known models."""

from dataclasses import dataclass, field

from fastgpt.ops.attention_checks import MAX_HEAD_DIM
from fastgpt.ops.ffn import ACTIVATIONS

VARIANTS = ("gpt2", "llama")
QUANTIZED = ("int8", "int4")

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
# The same; then n_kv_head, n_inner, rope_theta, tied. SmolLM2: Ben Allal et al., 2025,
# https://arxiv.org/abs/2502.02737. Llama 2: Touvron et al., 2023, https://arxiv.org/abs/2307.09288;
# Llama 3: Grattafiori et al., 2024, https://arxiv.org/abs/2407.21783, table 3, with the context of
# its pre-training and without the scaled positions of 3.1.
_LLAMA_PRESETS: dict[str, tuple[tuple[int, int, int, int, int], int, int, float, bool]] = {
    "tiny-llama": ((256, 2048, 4, 4, 256), 2, 704, 1e4, True),
    "smollm2-135m": ((8192, 49152, 30, 9, 576), 3, 1536, 1e5, True),
    "smollm2-360m": ((8192, 49152, 32, 15, 960), 5, 2560, 1e5, True),
    "llama2-7b": ((4096, 32000, 32, 32, 4096), 32, 11008, 1e4, False),
    "llama2-13b": ((4096, 32000, 40, 40, 5120), 40, 13824, 1e4, False),
    "llama2-70b": ((4096, 32000, 80, 64, 8192), 8, 28672, 1e4, False),
    "llama3-8b": ((8192, 128256, 32, 32, 4096), 8, 14336, 5e5, False),
    "llama3-70b": ((8192, 128256, 80, 64, 8192), 8, 28672, 5e5, False),
    "llama3-405b": ((8192, 128256, 126, 128, 16384), 8, 53248, 5e5, False),
}
PRESETS = (*_PRESETS, *_LLAMA_PRESETS)
"""Names that `GPTConfig.preset` takes."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2's smallest.

    Attributes:
        block_size: the longest context, in tokens.
        vocab_size: ids are 0 .. vocab_size - 1.
        n_layer: blocks.
        n_head: attention heads of a block.
        n_embd: width.
        dropout: probability, in training mode, after the embedding, on attention weights and on
            every branch.
        bias: whether linear layers and layer norms have a bias; if None as the variant has it,
            True for "gpt2"; "llama" has none.
        activation: "gelu_tanh", "gelu", "relu" or "silu"; if None as the variant has it,
            "gelu_tanh" for "gpt2" and "silu" for "llama".
        variant: "gpt2", or "llama": rotary positions, RMS norm and a gated feed-forward.
        n_kv_head: heads of k and v, of which n_head is a multiple; n_head if None.
        n_head_dim: elements of a head, a multiple of 8, at most 256; n_embd / n_head if None.
        n_inner: width of the feed-forward inside; if None 4 n_embd, or for "llama" 8/3 n_embd,
            rounded up to a multiple of 64.
        norm_eps: added to variances and mean squares.
        tied: whether the output layer is wte; if not, it has weights of its own, lm_head.
        rope_theta: base of the frequencies of rotary embedding; "llama" only.
        qk_norm: whether q and k of each head are RMS-normalised first; "llama" only.
        window: how many positions attention sees, its own included, as Mistral's sliding window;
            all if None.
        recompute: what the kernels make again in backward rather than keep. 0: nothing. 1: the
            activation, which costs no matrix product. 2: the norms and the first product of the
            feed-forward too, 2 n_embd n_inner operations a token and layer, twice that if gated: a
            ninth, or a seventh, of those that the blocks' weights take in a training step. It is no
            part of the shape: models that differ in it alone are equal.
        quantized: "int8" or "int4" if the weights are of as many bits, see `fastgpt.compress`.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool | None = None
    activation: str | None = None
    variant: str = "gpt2"
    n_kv_head: int | None = None
    n_head_dim: int | None = None
    n_inner: int | None = None
    norm_eps: float = 1e-5
    tied: bool = True
    rope_theta: float = 1e4
    qk_norm: bool = False
    window: int | None = None
    recompute: int = field(default=1, compare=False)
    quantized: str | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(
                f"GPTConfig: variant must be one of {', '.join(VARIANTS)}; got {self.variant!r}"
            )
        if self.bias is None:
            object.__setattr__(self, "bias", not self.llama)
        if self.activation is None:
            object.__setattr__(self, "activation", "silu" if self.llama else "gelu_tanh")
        self._check_numbers()
        self._check_heads()
        for name in ("bias", "tied", "qk_norm"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"GPTConfig: {name} must be True or False; got {value!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"GPTConfig: activation must be one of {', '.join(ACTIVATIONS)};"
                f" got {self.activation!r}"
            )
        if self.recompute not in (0, 1, 2) or isinstance(self.recompute, bool):
            raise ValueError(f"GPTConfig: recompute must be 0, 1 or 2; got {self.recompute!r}")
        if self.quantized not in (None, *QUANTIZED):
            raise ValueError(
                f"GPTConfig: quantized must be None, {' or '.join(QUANTIZED)};"
                f" got {self.quantized!r}"
            )
        if self.llama and self.bias:
            raise ValueError('GPTConfig: variant "llama" has no biases; got bias True')
        if not self.llama and (self.qk_norm or self.rope_theta != 1e4):
            name = "qk_norm" if self.qk_norm else "rope_theta"
            raise ValueError(
                f'GPTConfig: {name} is of variant "llama" only;'
                f" got {name} {getattr(self, name)}, variant {self.variant!r}"
            )

    def _check_numbers(self) -> None:
        may_be_none = ("n_kv_head", "n_head_dim", "n_inner", "window")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", *may_be_none):
            value = getattr(self, name)
            if value is None and name in may_be_none:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"GPTConfig: {name} must be an int; got {value!r}")
            if value < 1:
                raise ValueError(f"GPTConfig: {name} must be at least 1; got {value}")
        for name in ("dropout", "norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"GPTConfig: {name} must be a number; got {value!r}")
            if name != "dropout" and not value > 0.0:
                raise ValueError(f"GPTConfig: {name} must be positive; got {value}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"GPTConfig: dropout must lie in [0, 1); got {self.dropout}")

    def _check_heads(self) -> None:
        if self.n_head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                "GPTConfig: n_embd must be a multiple of n_head;"
                f" got n_embd {self.n_embd}, n_head {self.n_head}"
            )
        if (D := self.head_dim) % 8 or D > MAX_HEAD_DIM:
            name, got = "n_head_dim", f"{D}"
            if self.n_head_dim is None:
                name, got = "n_embd / n_head", f"{self.n_embd} / {self.n_head} = {D}"
            raise ValueError(
                f"GPTConfig: {name} must be a multiple of 8, at most {MAX_HEAD_DIM}; got {got}"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(
                "GPTConfig: n_head must be a multiple of n_kv_head;"
                f" got n_head {self.n_head}, n_kv_head {self.n_kv_head}"
            )

    @property
    def llama(self) -> bool:
        """Whether the variant is "llama"."""
        return self.variant == "llama"

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.n_embd // self.n_head if self.n_head_dim is None else self.n_head_dim

    @property
    def kv_heads(self) -> int:
        """Heads of k and v."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def inner(self) -> int:
        """Width of the feed-forward inside."""
        if self.n_inner is not None:
            return self.n_inner
        return -(-8 * self.n_embd // (3 * 64)) * 64 if self.llama else 4 * self.n_embd

    def flops(self, T: int, training: bool = False) -> int:
        """Floating-point operations of the matrix products over one sequence of T tokens.

        A multiply-add is two. Each weight of a linear layer takes 2 T, for GPT-2 in all
        2 T (12 n_layer C^2 + V C), attention, of which a causal model needs T (T + 1) / 2 pairs,
        2 n_layer H D T (T + 1), and fewer with a window. Training takes three times the forward
        pass: each product has two in its backward.
        """
        attention = self.n_embd * (2 * self.n_head + 2 * self.kv_heads) * self.head_dim
        feed_forward = (3 if self.llama else 2) * self.n_embd * self.inner
        weights = self.n_layer * (attention + feed_forward) + self.vocab_size * self.n_embd
        beyond = 0 if self.window is None else max(0, T - self.window)
        pairs = (T * (T + 1) - beyond * (beyond + 1)) // 2
        forward = 2 * T * weights + 4 * self.n_layer * self.n_head * self.head_dim * pairs
        return 3 * forward if training else forward

    @classmethod
    def preset(cls, name: str) -> "GPTConfig":
        """The shape of a known model: one of `PRESETS`, without dropout.

        Raises:
            ValueError: no preset has that name.
        """
        if name in _LLAMA_PRESETS:
            shape, n_kv_head, n_inner, theta, tied = _LLAMA_PRESETS[name]
            return cls(
                *shape, variant="llama", n_kv_head=n_kv_head, n_inner=n_inner, tied=tied,
                rope_theta=theta,
            )  # fmt: skip
        if name not in _PRESETS:
            raise ValueError(
                f"GPTConfig: the preset must be one of {', '.join(PRESETS)}; got {name!r}"
            )
        block_size, vocab_size, n_layer, n_head, n_embd = _PRESETS[name]
        return cls(block_size, vocab_size, n_layer, n_head, n_embd)
