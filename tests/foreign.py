"""Models as other people write them, tiny: nanoGPT's and minGPT's shape, torch's encoder, and
transformers' from a configuration. Each takes ids (B, T) and can be asked for a loss."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, C, H, T = 61, 32, 2, 12


class NanoNorm(nn.Module):
    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class SelfAttention(nn.Module):
    bias: Tensor

    def __init__(self, dropout: float, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.n_head, self.n_embd, self.flash, self.dropout = H, C, flash, dropout
        if not flash:
            self.register_buffer("bias", torch.tril(torch.ones(T, T)).view(1, 1, T, T))

    def forward(self, x: Tensor) -> Tensor:
        B, n, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, n, self.n_head, c // self.n_head).transpose(1, 2)
        q = q.view(B, n, self.n_head, c // self.n_head).transpose(1, 2)
        v = v.view(B, n, self.n_head, c // self.n_head).transpose(1, 2)
        if self.flash:
            p = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, None, p, True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :n, :n] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(B, n, c)
        y = self.resid_dropout(self.c_proj(y))
        return y


class NanoMLP(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        x = self.dropout(x)
        return x


class NanoBlock(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.attn = NanoNorm(C), SelfAttention(dropout, True)
        self.ln_2, self.mlp = NanoNorm(C), NanoMLP(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class MiniBlock(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(C), SelfAttention(dropout, False)
        self.ln_2 = nn.LayerNorm(C)
        self.mlp: Any = nn.ModuleDict(
            {"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C), "act": NewGELU(),
             "dropout": nn.Dropout(dropout)}
        )  # fmt: skip
        m: Any = self.mlp
        self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlpf(self.ln_2(x))
        return x


class LM(nn.Module):
    """Embeddings, blocks, a norm and a head; in nanoGPT's way logits come with the loss."""

    def __init__(self, blocks: list[nn.Module], norm: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.drop, self.h, self.ln_f = nn.Dropout(dropout), nn.ModuleList(blocks), norm
        self.lm_head = nn.Linear(C, V, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device)))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def nanogpt(dropout: float = 0.0) -> Any:
    return LM([NanoBlock(dropout) for _ in range(2)], NanoNorm(C), dropout)


def mingpt(dropout: float = 0.0) -> Any:
    return LM([MiniBlock(dropout) for _ in range(2)], nn.LayerNorm(C), dropout)


class Encoder(nn.TransformerEncoder):
    def forward(self, x: Tensor, **masks: Any) -> Tensor:  # type: ignore[override]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        return super().forward(x, mask=mask, is_causal=True, **masks)


def encoder(dropout: float = 0.0, **options: Any) -> Any:
    options = {"norm_first": True, "batch_first": True, "activation": "gelu"} | options
    layer = nn.TransformerEncoderLayer(C, H, 64, dropout, **options)
    return LM([Encoder(layer, 2, enable_nested_tensor=False)], nn.LayerNorm(C), dropout)


def gpt2(dropout: float = 0.0, **options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    p = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout) | options
    config = GPT2Config(
        vocab_size=V,
        n_embd=C,
        n_head=H,
        n_layer=2,
        n_positions=T,
        bos_token_id=0,
        eos_token_id=0,
        **p,
    )
    return GPT2LMHeadModel(config)


def _sizes(**options: Any) -> dict[str, Any]:
    return {
        "vocab_size": V, "hidden_size": C, "num_attention_heads": H, "num_hidden_layers": 2,
        "max_position_embeddings": T, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
    } | options  # fmt: skip


def opt(dropout: float = 0.0, **options: Any) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = _sizes(word_embed_proj_dim=C, ffn_dim=64, **options)
    return OPTForCausalLM(OPTConfig(dropout=dropout, attention_dropout=dropout, **sizes))


def neox(dropout: float = 0.0, **options: Any) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = _sizes(intermediate_size=64, hidden_dropout=dropout, attention_dropout=dropout)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes | options))


def bert(dropout: float = 0.0, **options: Any) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    p = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForMaskedLM(BertConfig(**_sizes(intermediate_size=64) | p | options))


def llama(dropout: float = 0.0, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = _sizes(intermediate_size=64, num_key_value_heads=1, attention_dropout=dropout)
    return LlamaForCausalLM(LlamaConfig(**sizes | options))


FAMILIES: dict[str, Callable[..., Any]] = {
    "nanoGPT": nanogpt,
    "minGPT": mingpt,
    "nn.TransformerEncoder": encoder,
    "GPT-2": gpt2,
    "OPT": opt,
    "GPT-NeoX, Pythia": neox,
    "GPT-NeoX, sequential": partial(neox, use_parallel_residual=False),
    "BERT, RoBERTa, ELECTRA": bert,
    "Llama": llama,
}


def ids(B: int = 2, n: int = T, seed: int = 0) -> Tensor:
    return torch.randint(2, V, (B, n), generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out[0] if isinstance(out, tuple) else out.logits


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, LM):
        loss: Tensor = model(x[:, :-1], x[:, 1:])[1]
        return loss
    return model(x, labels=x).loss


def randomized(model: Any) -> Any:
    """With biases that are not 0 and norms that are not 1, so that none can be forgotten."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model
