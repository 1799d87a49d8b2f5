"""Training that does not tell whether any one sample took part: DP-SGD of a GPT, by opacus.

A step draws each of N samples with probability q (Poisson), takes every drawn sample's own
gradient g_i, clips it to length C, and adds noise:

    g = (sum_i g_i min(1, C / |g_i|) + sigma C z) / (q N),    z ~ N(0, I)

The weights are then (epsilon, delta)-private: for sets of samples that differ in one, and any set
S of weights, P(weights in S) <= e^epsilon P'(weights in S) + delta. A sample is a row: whoever
wrote several has a weaker promise.

Abadi et al., Deep learning with differential privacy, 2016, https://arxiv.org/abs/1607.00133,
algorithm 1. opacus does the drawing, clipping, noise and accounting; here are the gradients of a
sample for the layers that are fastgpt's own, and a form of GPT in which every weight is used by a
module, where hooks see it: the products of the feed-forward one by one, positions (B, T), and
logits in place of the loss head that never makes them.
"""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import norms
from fastgpt.lora import LoRALinear
from fastgpt.model import GPT, IGNORE
from fastgpt.optim import AdamW

try:
    from opacus import PrivacyEngine
    from opacus.grad_sample import register_grad_sampler
    from opacus.grad_sample.rms_norm import compute_rms_norm_grad_sample
    from opacus.utils.batch_memory_manager import BatchMemoryManager
except ImportError:
    raise ImportError(
        "privacy: needs the package opacus; pip install 'fastgpt-triton[privacy]'"
    ) from None

UNCLIPPED = 1e12  # a length that no gradient has

__all__ = ["PerSample", "PrivacyConfig", "Spent", "exposure", "sample_losses", "train_private"]


@register_grad_sampler(norms.LayerNorm)
def _layer_norm(
    layer: norms.LayerNorm, activations: list[Tensor], grad: Tensor
) -> dict[nn.Parameter, Tensor]:
    """grad: (B, T, C), of a norm that was given x alone; opacus' own asks for a bias."""
    x_hat = F.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps)
    found = {layer.weight: torch.einsum("btc,btc->bc", grad, x_hat)}
    if layer.bias is not None:
        found[layer.bias] = grad.sum(1)
    return {p: g for p, g in found.items() if p.requires_grad}


register_grad_sampler(norms.RMSNorm)(compute_rms_norm_grad_sample)


@register_grad_sampler(LoRALinear)
def _lora(layer: LoRALinear, activations: list[Tensor], grad: Tensor) -> dict[nn.Parameter, Tensor]:
    """grad: (B, T, out), without dropout in the layer."""
    x = activations[0].to(layer.lora_A.dtype)
    grad = grad.to(x.dtype) * layer.scale
    return {
        layer.lora_A: torch.einsum("btr,bti->bri", grad @ layer.lora_B, x),
        layer.lora_B: torch.einsum("bto,btr->bor", grad, F.linear(x, layer.lora_A)),
    }


class PerSample(nn.Module):
    """A GPT's logits by modules alone, for whoever hooks them: the same parameters and numbers.

    Args:
        model: of float weights.

    Raises:
        NotImplementedError: it is quantised, has qk_norm, whose weights no module uses, or LoRA
            with dropout, whose mask a sample's gradient would need.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        c = model.config
        if c.quantized is not None or c.qk_norm:
            what = f"{c.quantized} weights" if c.quantized is not None else "qk_norm"
            raise NotImplementedError(f"privacy: a model with {what} has no gradient a sample")
        for name, layer in model.named_modules():
            if isinstance(layer, LoRALinear) and layer.dropout:
                raise NotImplementedError(
                    f"privacy: LoRA must be without dropout; {name} has {layer.dropout}"
                )
        self.gpt = model
        self.wpe: nn.Embedding | None = None
        self.head: nn.Module
        if model.wpe is not None:
            self.wpe = nn.Embedding(c.block_size, c.n_embd, device="meta")
            self.wpe.weight = model.wpe.weight
        if model.lm_head is None:
            head = nn.Linear(c.n_embd, c.vocab_size, bias=False, device="meta")
            head.weight = model.wte.weight
            self.head = head
        else:
            self.head = model.lm_head

    def forward(self, idx: Tensor) -> Tensor:
        """idx: (B, T) int64 -> (B, T, V)."""
        T, p = idx.shape[1], self.gpt.config.dropout if self.training else 0.0
        h = self.gpt.wte(idx)
        if self.wpe is not None:
            places = torch.arange(T, device=idx.device).repeat(idx.shape[0], 1)
            h = h + self.wpe(places)
        h = F.dropout(h, p)
        turn = self.gpt._turn(0, T)
        for block in self.gpt.h:
            ln_1, attn, ln_2, mlp = (
                block.get_submodule(n) for n in ("ln_1", "attn", "ln_2", "mlp")
            )
            h = h + F.dropout(attn(ln_1(h), turn=turn), p)
            h = h + F.dropout(mlp(ln_2(h)), p)
        y: Tensor = self.head(self.gpt.ln_f(h))
        return y


@dataclass(frozen=True)
class PrivacyConfig:
    """What is promised, and how it is trained.

    Attributes:
        epsilon: to be spent at the end; the noise for it is searched for, which takes seconds.
        noise_multiplier: sigma, in place of epsilon, which is then None; 0 is no noise and no
            clipping, for comparison.
        delta: at most a small part of one in N; None is 1 / (10 N).
        epochs: N q draws are expected of each epoch's 1 / q steps.
        batch_size: samples that a step is expected to draw, q N.
        rows: the most in a forward pass: each keeps its own gradient of every parameter.
        max_grad_norm: C.
        lr, weight_decay: of AdamW.
        seed: of draws and noise; who knows it can take the noise away, so None asks the system.
    """

    epsilon: float | None = 8.0
    noise_multiplier: float | None = None
    delta: float | None = None
    epochs: int = 10
    batch_size: int = 256
    rows: int = 32
    max_grad_norm: float = 1.0
    lr: float = 1e-3
    weight_decay: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError(
                "privacy: one of epsilon and noise_multiplier must be given, the other None;"
                f" got {self.epsilon} and {self.noise_multiplier}"
            )
        if self.noise_multiplier is not None and self.noise_multiplier < 0.0:
            raise ValueError(
                f"privacy: noise_multiplier must not be negative; got {self.noise_multiplier}"
            )
        for name in ("epsilon", "max_grad_norm", "lr", "epochs", "batch_size", "rows"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"privacy: {name} must be positive and finite; got {value}")
        if self.delta is not None and not 0.0 < self.delta < 1.0:
            raise ValueError(f"privacy: delta must lie in (0, 1); got {self.delta}")


@dataclass(frozen=True)
class Spent:
    """What training took.

    Attributes:
        epsilon, delta: the promise; epsilon is infinite without noise.
        noise_multiplier: sigma.
        sample_rate: q.
        steps: made.
        clipped: share of the samples' gradients that were longer than C.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    clipped: float


def sample_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Each sample's mean loss over its own targets: (B, T, V) and (B, T) -> (B,), in nats.

    The mean over all targets of a batch would not do: there a sample's gradient depends on how
    long the others are, and what one sample changes is no longer bounded by C.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(logits.mT, targets, ignore_index=IGNORE, reduction="none")
    return each.sum(1) / (targets != IGNORE).sum(1).clamp(min=1)


def train_private(
    model: GPT, idx: Tensor, targets: Tensor, config: PrivacyConfig | None = None
) -> Iterator[Spent]:
    """Train a model in place by DP-SGD; yield what is spent after each epoch.

    Args:
        model: any GPT of float weights, with LoRA or without, on the device to train on. Only
            parameters that require a gradient are trained.
        idx: (N, T) int64, a sample a row.
        targets: (N, T) int64, -100 where none takes part; nothing in a row may come from another.
        config: PrivacyConfig() if None.

    Raises:
        ValueError: idx and targets differ in shape, or there are fewer samples than batch_size.
        NotImplementedError: see `PerSample`.
    """
    c = PrivacyConfig() if config is None else config
    if idx.ndim != 2 or idx.shape != targets.shape:
        raise ValueError(
            "privacy: idx and targets must both be (N, T);"
            f" got {tuple(idx.shape)} and {tuple(targets.shape)}"
        )
    if len(idx) < c.batch_size:
        raise ValueError(
            f"privacy: there must be at least batch_size {c.batch_size} samples; got {len(idx)}"
        )
    return _epochs(model, idx, targets, c, 1.0 / (10 * len(idx)) if c.delta is None else c.delta)


def _epochs(
    model: GPT, idx: Tensor, targets: Tensor, c: PrivacyConfig, delta: float
) -> Iterator[Spent]:
    device, training = model.ln_f.weight.device, model.training
    private = PerSample(model).train()
    seed = int.from_bytes(os.urandom(7), "little") if c.seed is None else c.seed
    draws = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed + 1)
    data = torch.utils.data.TensorDataset(idx, targets)
    loader = torch.utils.data.DataLoader(data, c.batch_size, generator=draws)
    trained = [p for p in model.parameters() if p.requires_grad]
    parts: dict[str, Any] = {
        "module": private, "optimizer": AdamW(trained, c.lr, weight_decay=c.weight_decay),
        "data_loader": loader, "noise_generator": noise,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of generators that are no cryptographic ones
        engine = PrivacyEngine(accountant="prv")
        if c.noise_multiplier is None:
            hooked, optimizer, loader = engine.make_private_with_epsilon(
                **parts, target_epsilon=c.epsilon, target_delta=delta, epochs=c.epochs,
                max_grad_norm=c.max_grad_norm,
            )  # fmt: skip
        else:
            hooked, optimizer, loader = engine.make_private(
                **parts, noise_multiplier=c.noise_multiplier,
                max_grad_norm=c.max_grad_norm if c.noise_multiplier else UNCLIPPED,
            )  # fmt: skip
    rate, steps, seen, clipped = 1.0 / len(loader), 0, 0, torch.zeros((), device=device)
    try:
        for _ in range(c.epochs):
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=c.rows, optimizer=optimizer
            ) as passes:
                for x, y in passes:
                    loss = sample_losses(hooked(x.to(device)), y.to(device)).mean()
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # ids have no gradient
                        loss.backward()
                    norms_ = torch.stack([g.flatten(1).norm(dim=1) for g in optimizer.grad_samples])
                    clipped += (norms_.norm(dim=0) > optimizer.max_grad_norm).sum()
                    seen += len(x)
                    optimizer.step()
                    steps += not optimizer._is_last_step_skipped
                    optimizer.zero_grad()
            sigma = optimizer.noise_multiplier
            epsilon = float(engine.get_epsilon(delta)) if sigma else math.inf
            yield Spent(epsilon, delta, sigma, rate, steps, float(clipped) / max(1, seen))
    finally:
        hooked.to_standard_module()
        for p in model.parameters():
            for name in ("grad_sample", "summed_grad", "_forward_counter"):
                if hasattr(p, name):
                    delattr(p, name)
            p.grad = None
        model.train(training)


@torch.no_grad()
def exposure(
    model: GPT, prefix: Sequence[int], candidates: Tensor, secret: int, rows: int = 512
) -> float:
    """How much a planted secret stands out among all it could have been, in bits.

        exposure = log2 R - log2 rank,   rank 1 for the likeliest of R candidates

    From 0 to log2 R; of a secret that a model never saw it is 1.44 in the mean.
    Carlini et al., The secret sharer, 2019, https://arxiv.org/abs/1802.08232, section 4.2.

    Args:
        model: any GPT.
        prefix: ids before the secret, at least one.
        candidates: (R, n) int64, all that could follow.
        secret: the row of candidates that was planted.
        rows: of a forward pass.

    Raises:
        ValueError: secret is no row of candidates, or prefix is empty.
    """
    R, n = candidates.shape
    if not 0 <= secret < R or not prefix:
        raise ValueError(
            f"exposure: secret must be a row of {R} candidates after a prefix;"
            f" got {secret} after {len(prefix)} ids"
        )
    training, device = model.training, model.ln_f.weight.device
    model.eval()
    start = torch.tensor(prefix, device=device)
    found = []
    for part in candidates.to(device).split(rows):
        ids = torch.cat([start.expand(len(part), -1), part], 1)
        logits = model.logits(model.hidden(ids[:, :-1])[:, -n:]).float()
        found.append(-F.cross_entropy(logits.mT, part, reduction="none").sum(1))
    model.train(training)
    score = torch.cat(found)
    rank = 1 + int((score > score[secret]).sum())
    return math.log2(R / rank)
