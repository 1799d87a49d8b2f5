"""LoRA: a GPT trained through low-rank matrices beside its frozen linear layers.

    y = x W^T + b + (alpha / rank) (dropout(x) A^T) B^T

A is (rank, in), B (out, rank) and 0 at first, so that training begins at the model as it was.
`fastgpt.adapters` keeps A and B in files as the package peft has them.

Hu et al., LoRA: low-rank adaptation of large language models, 2021,
https://arxiv.org/abs/2106.09685, section 4.1.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.model import GPT

__all__ = [
    "LoRALinear", "LoraConfig", "add", "describe", "layers", "merge", "merged_weights", "rebuild",
    "replace_layer",
]  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """Which layers are adapted, and how.

    Attributes:
        rank: of the matrices; 0 for no LoRA.
        alpha: the product of the matrices is multiplied by alpha / rank.
        targets: names of linear layers of the blocks, whole or their ends: "c_attn", "mlp.c_proj",
            "h.0.attn.c_proj", ...; none for all of them.
        dropout: probability of dropping an input of A, in training mode.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora: rank must not be negative; got {self.rank}")
        if not self.alpha > 0.0:
            raise ValueError(f"lora: alpha must be positive; got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora: dropout must lie in [0, 1); got {self.dropout}")


class LoRALinear(nn.Linear):
    """y = x W^T + b + (alpha / rank) (dropout(x) A^T) B^T, with W and b frozen.

    W and b are the base layer's own parameters, under their own names. A and B are float32 where
    those are of 16 bits, so that small steps are not lost.

    Args:
        base: the layer that is adapted.
        rank, alpha, dropout: see `LoraConfig`.
    """

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float = 16.0, dropout: float = 0.0
    ) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, "meta")
        self.weight, self.bias = base.weight, base.bias
        for p in base.parameters():
            p.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        device = base.weight.device
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        A = torch.empty(rank, base.in_features, device=device, dtype=dtype)
        B = torch.zeros(base.out_features, rank, device=device, dtype=dtype)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5.0))
        self.train(base.training)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        y = F.linear(x, self.weight, self.bias)
        low = F.dropout(x, self.dropout, self.training)
        if not torch.is_autocast_enabled(x.device.type):
            low = low.to(self.lora_A.dtype)
        low = F.linear(low, self.lora_A) * self.scale  # (..., rank)
        return y + F.linear(low, self.lora_B).to(y.dtype)

    def merged(self) -> Tensor:
        """W + (alpha / rank) B A, (out, in), of W's dtype."""
        with torch.no_grad():
            change = (self.lora_B @ self.lora_A) * self.scale
            return (self.weight.to(change.dtype) + change).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"


def layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def add(model: GPT, config: LoraConfig) -> GPT:
    """Put LoRA on linear layers of a model's blocks, in place, and freeze all else.

    Args:
        model: before it is compiled or sharded.
        config: its rank at least 1.

    Returns:
        The model.

    Raises:
        ValueError: rank is 0, a target names no linear layer of the blocks, or the model has LoRA.
    """
    if config.rank < 1:
        raise ValueError(f"lora: rank must be at least 1; got {config.rank}")
    if any(layers(model)):
        raise ValueError("lora: the model must have no LoRA; it has, which merge() ends")
    linear = {
        f"h.{name}": m for name, m in model.h.named_modules() if isinstance(m, nn.Linear)
    }  # fmt: skip
    for target in config.targets:
        if not any(_named(name, target) for name in linear):
            kinds = sorted({name.split(".", 2)[2] for name in linear})
            raise ValueError(
                "lora: targets must be linear layers of the blocks, as"
                f" {', '.join(kinds)}; got {target!r}"
            )
    model.requires_grad_(False)
    for name, base in linear.items():
        if not config.targets or any(_named(name, target) for target in config.targets):
            replace_layer(model, name, LoRALinear(base, config.rank, config.alpha, config.dropout))
    return model


def merge(model: GPT) -> GPT:
    """Add the product of the matrices to the weights, in place: plain layers, all trainable.

    The model's outputs stay what they were, within the rounding of its dtype.

    Returns:
        The model.
    """
    for name, layer in list(layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        plain.weight, plain.bias = nn.Parameter(layer.merged()), layer.bias
        replace_layer(model, name, plain.train(layer.training))
    return model.requires_grad_(True)


def merged_weights(model: GPT) -> dict[str, Tensor]:
    """The state_dict that `merge` would give, without a change to the model."""
    weights: dict[str, Tensor] = model.state_dict()
    for name, layer in layers(model):
        del weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]
        weights[f"{name}.weight"] = layer.merged()
    return weights


def describe(model: nn.Module) -> dict[str, dict[str, float]]:
    """The adapted layers of a model in plain values, from which `rebuild` makes them again."""
    return {
        name: {"rank": layer.rank, "alpha": layer.alpha, "dropout": layer.dropout}
        for name, layer in layers(model)
    }


def rebuild(model: GPT, described: Mapping[str, Mapping[str, float]]) -> GPT:
    """Adapt the layers that `describe` has told of, in place, and freeze all else.

    Raises:
        ValueError: the model has no such linear layer.
    """
    model.requires_grad_(False)
    for name, about in described.items():
        try:
            base = model.get_submodule(name)
        except AttributeError:
            base = None
        if type(base) is not nn.Linear:
            raise ValueError(f"lora: the model must have the linear layer {name}; it has not")
        replace_layer(model, name, LoRALinear(base, int(about["rank"]), about["alpha"],
                                              about["dropout"]))  # fmt: skip
    return model


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place that name is in a model."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
