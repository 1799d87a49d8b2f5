"""LoRA's matrices in files, as the package peft writes and reads them.

    folder/adapter_config.json            rank, alpha, targets, the base model's name
    folder/adapter_model.safetensors      base_model.model.<layer>.lora_A.weight (rank, in) and
                                          .lora_B.weight (out, rank), float32

Layers have Hugging Face's names (`fastgpt.layouts`), so peft.PeftModel.from_pretrained puts the
files on transformers' GPT-2 or Llama, and what peft trained on these is read here. A Llama's
q_proj, k_proj and v_proj are one c_attn here: its A stands in each of the three files' entries,
and three As that differ are stacked, to a layer of the sum of their ranks.
"""

import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgpt.layouts import their_names
from fastgpt.lora import LoRALinear, layers, replace_layer
from fastgpt.model import GPT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Variants of LoRA that peft has and this library has not.
_LACKING = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
    "monteclora_config", "velora_config", "kasa_config",
)  # fmt: skip


def save_adapter(model: GPT, folder: str | os.PathLike[str], base: str | None = None) -> None:
    """Write a model's LoRA matrices, and no other weight, as peft has them.

    Args:
        model: with LoRA.
        folder: made if it is not there; each file is written whole or not at all.
        base: what the files call the base model, as a name on the Hugging Face Hub.

    Raises:
        ValueError: the model has no LoRA.
    """
    found = dict(layers(model))
    if not found:
        raise ValueError("save_adapter: the model must have LoRA; it has none")
    parts = {name: _split(model, name, layer) for name, layer in found.items()}
    weights = {
        f"{PREFIX}{theirs}.lora_{side}.weight": t.detach().cpu().contiguous().clone()
        for split in parts.values()
        for theirs, pair in split.items()
        for side, t in zip("AB", pair, strict=True)
    }
    first = next(iter(found.values()))
    odd = {
        theirs: layer
        for name, layer in found.items()
        if (layer.rank, layer.alpha) != (first.rank, first.alpha)
        for theirs in parts[name]
    }
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout,
        "rank_pattern": {name: layer.rank for name, layer in odd.items()},
        "alpha_pattern": {name: layer.alpha for name, layer in odd.items()},
        "target_modules": _targets([theirs for split in parts.values() for theirs in split], model),
        "bias": "none", "fan_in_fan_out": not model.config.llama, "init_lora_weights": True,
        "inference_mode": True,
    }  # fmt: skip
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".save_adapter.", dir=folder))
    try:
        save_file(weights, part / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (part / CONFIG).write_text(text, encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(part / name, folder / name)
    finally:
        shutil.rmtree(part)


def load_adapter(model: GPT, folder: str | os.PathLike[str]) -> GPT:
    """Put LoRA matrices from files on a model, in place, and freeze all else.

    Args:
        model: the base model, without LoRA.
        folder: that `save_adapter` or peft wrote.

    Returns:
        The model. `fastgpt.lora.merge` makes plain layers of it.

    Raises:
        ValueError: the files are missing, broken, of another kind of adapter or of another base
            model, or the model has LoRA.
    """
    folder = Path(folder).expanduser()
    if any(layers(model)):
        raise ValueError("load_adapter: the model must have no LoRA; it has, which merge() ends")
    config, weights = _read(folder)
    ours = {
        theirs: (name, n)
        for name in (f"h.{n}" for n, m in model.h.named_modules() if isinstance(m, nn.Linear))
        for n, theirs in enumerate(_theirs(model, name))
    }
    found: dict[str, dict[int, tuple[Tensor, Tensor, float]]] = defaultdict(dict)
    for key in sorted(weights):
        theirs, _, side = key.removeprefix(PREFIX).rpartition(".lora_")
        if theirs not in ours or side not in ("A.weight", "B.weight"):
            raise ValueError(
                f"load_adapter: {folder} must adapt linear layers of the blocks; it has {key}"
            )
        pair = [weights.get(f"{PREFIX}{theirs}.lora_{s}.weight") for s in "AB"]
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"load_adapter: {folder} must hold A and B of {theirs}; it holds one")
        name, n = ours[theirs]
        found[name][n] = pair[0], pair[1], _scale(config, theirs, len(pair[0]))
    dropout = float(config.get("lora_dropout") or 0.0)
    model.requires_grad_(False)
    made = {name: _stack(model, name, parts, dropout, folder) for name, parts in found.items()}
    for name, layer in made.items():
        replace_layer(model, name, layer)
    return model


def _theirs(model: GPT, name: str) -> tuple[str, ...]:
    """Hugging Face's names, one or three, of one of our layers."""
    names = their_names({f"{name}.weight": None}, model.config)[f"{name}.weight"]
    return tuple(n.removesuffix(".weight") for n in names)


def _rows(model: GPT, count: int, total: int) -> list[int]:
    """Of which lengths the parts of a layer's rows are."""
    if count == 1:
        return [total]
    kv = model.config.kv_heads * model.config.head_dim
    return [total - 2 * kv, kv, kv]


def _split(model: GPT, name: str, layer: LoRALinear) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of a layer for each of Hugging Face's layers that it is."""
    names = _theirs(model, name)
    bs = layer.lora_B.split(_rows(model, len(names), layer.out_features))
    return {theirs: (layer.lora_A, b) for theirs, b in zip(names, bs, strict=True)}


def _targets(names: list[str], model: GPT) -> list[str]:
    """Names for peft's target_modules: ends that all blocks share, or whole names."""
    blocks = defaultdict(list)
    for name in names:
        _, _, rest = name.partition(".h." if not model.config.llama else ".layers.")
        blocks[rest.partition(".")[2]].append(name)
    whole = len(model.h)
    return sorted(
        n for end, names in blocks.items() for n in ([end] if len(names) == whole else names)
    )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        name = Path(str(error.filename or WEIGHTS)).name
        raise ValueError(f"load_adapter: {folder} must hold {name}; it does not") from None
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"load_adapter: {folder} is broken; {reason}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA":
        raise ValueError(f"load_adapter: {folder} must be of peft_type LORA; got {kind!r}")
    for name in _LACKING:
        if config.get(name):
            raise ValueError(
                f"load_adapter: {folder} must be plain LoRA; its {name} is {config[name]!r}"
            )
    if config.get("bias", "none") != "none":
        raise ValueError(f'load_adapter: bias must be "none"; got {config["bias"]!r} in {folder}')
    if not weights:
        raise ValueError(f"load_adapter: {folder} must hold a layer's matrices; it holds none")
    return config, weights


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """What B A is multiplied with, in peft's words: by a pattern, or by the whole's alpha."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _stack(
    model: GPT,
    name: str,
    parts: dict[int, tuple[Tensor, Tensor, float]],
    dropout: float,
    folder: Path,
) -> LoRALinear:
    """One layer of the matrices of the layers that it is."""
    base = model.get_submodule(name)
    assert isinstance(base, nn.Linear)
    rows = _rows(model, len(_theirs(model, name)), base.out_features)
    for n, (a, b, _) in parts.items():
        if a.ndim != 2 or a.shape[1] != base.in_features or b.shape != (rows[n], len(a)):
            raise ValueError(
                f"load_adapter: {folder} must hold A (rank, {base.in_features}) and"
                f" B ({rows[n]}, rank) of {name}; got {tuple(a.shape)}, {tuple(b.shape)}"
            )
    first, _, scale = next(iter(parts.values()))
    same = len(parts) == len(rows) and all(torch.equal(a, first) for a, _, _ in parts.values())
    if same and len({s for _, _, s in parts.values()}) == 1:
        A, B = first, torch.cat([parts[n][1] for n in range(len(rows))])
    else:
        A = torch.cat([a for a, _, _ in parts.values()])
        B, column, start = A.new_zeros(base.out_features, len(A)), 0, [0]
        for length in rows:
            start.append(start[-1] + length)
        for n, (a, b, own) in parts.items():
            B[start[n] : start[n + 1], column : column + len(a)] = b * (own / scale)
            column += len(a)
    layer = LoRALinear(base, len(A), scale * len(A), dropout)
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    return layer
