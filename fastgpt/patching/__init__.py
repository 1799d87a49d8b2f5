"""`fastgpt.patch(model)`: somebody else's model on fastgpt's ops, with its own parameters.

Modules are recognised by what they compute, not by what they are called: a feed-forward or a block
by following its forward with torch.fx, a norm, an activation or an attention by comparing it with
fastgpt's on a small input in float64. What is recognised gets another forward (swap.py); the model
stays the objects it was.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastgpt import layers
from fastgpt.patching.attention import recognise_attention
from fastgpt.patching.chunk import recognise_chunk
from fastgpt.patching.encoder import recognise_encoder, recognise_multihead
from fastgpt.patching.feed_forward import activation_module, linear, recognise_feed_forward
from fastgpt.patching.hugging_face import (
    asks_interface,
    attention_obstacle,
    pretrained,
    recognise_loss_head,
    switch_attention,
)
from fastgpt.patching.norms import how_of, recognise_norm
from fastgpt.patching.report import Line, Report
from fastgpt.patching.residual import Norms, recognise_add_norm, recognise_block
from fastgpt.patching.swap import Patched, Swap, at, patched_class, unhooked

__all__ = ["Line", "Report", "patch"]

Found = Swap | str | None
ALONE = "replace says so"
AS: dict[type[nn.Module], Callable[[nn.Module], Found]] = {
    layers.LayerNorm: lambda m: recognise_norm(m, "layer_norm"),
    layers.RMSNorm: lambda m: recognise_norm(m, "rms_norm"),
    layers.MLP: lambda m: _feed_forward(m, gated=False),
    layers.GatedMLP: lambda m: _feed_forward(m, gated=True),
    layers.CausalSelfAttention: lambda m: recognise_attention(m, True),
}


def _feed_forward(module: nn.Module, gated: bool) -> Found:
    found = recognise_feed_forward(module, True)
    if isinstance(found, Swap) and bool(found.how.gate) != gated:
        return "it has no gate" if gated else "it has a gate"
    return found


Replace = Mapping[type[nn.Module], type[nn.Module] | None]


def patch(model: nn.Module, *, replace: Replace | None = None, loss_head: bool = True) -> Report:
    """Run a model's layers on fastgpt's ops; its modules, parameters and hooks stay what they are.

    Replaced are layer norms and RMS norms, feed-forwards plain and gated, a norm together with the
    sum before it, attention as nanoGPT and minGPT write it, torch's nn.MultiheadAttention and
    nn.TransformerEncoderLayer, and of transformers' models the attention, by
    attn_implementation="fastgpt", and the loss of causal language models.

    Modules keep their names, classes (`isinstance`), state_dict, training mode, dtype and device;
    an optimizer made before goes on. A fused module whose inner layers are given hooks or are
    exchanged, before or after, runs its own forward for as long as that is so.

    Args:
        model: any module. What is patched already is left as it is.
        replace: what else is to be replaced, by class: {MyNorm: fastgpt.layers.LayerNorm}. The
            values may be LayerNorm, RMSNorm, MLP, GatedMLP and CausalSelfAttention of
            `fastgpt.layers`, whose formula the module must then compute; a class derived from the
            key, which takes its place as it is; or None, to leave modules of a class alone.
        loss_head: whether a causal language model in training mode, given labels, makes its loss
            without logits: outputs.logits is then None. In evaluation mode it makes both.

    Returns:
        What became of each module, and why. `report.undo()` takes it back.

    Raises:
        TypeError: model is no module, or replace holds something other than classes of modules.
        ValueError: parameters are on the meta device; a class in replace is not in the model, or
            its modules do not compute what they are to be replaced by. The model is then as it was.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
        >>> print(fastgpt.patch(model))
        1 of 3 modules replaced
        module       count  class       runs on
        (the model)      1  Sequential  left, its own code around its parts
        *                1  LayerNorm   layer_norm
        *                1  Linear      left, a product by itself is the vendor's
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be an nn.Module; got {type(model).__name__}")
    wanted = _check(model, dict(replace or {}))
    names = {m: name for name, m in model.named_modules()}
    found = _recognise(names, wanted, loss_head)
    inside = {
        at(m, part): type(m).__name__
        for m, swap in found.items() if isinstance(swap, Swap) for part in swap.takes
    }  # fmt: skip
    switched, attentions = _attentions(names, found)
    lines, now = [], {}
    for m, name in names.items():
        swap, kind = found.get(m), type(m).__name__
        if isinstance(swap, Swap):
            try:
                now[m] = patched_class(type(m), swap.mixin, swap.how)  # type: ignore[arg-type]
                held = not unhooked(*(at(m, part) for part in swap.takes))
                why = "but not for as long as inner layers have hooks" if held else ""
                lines.append(Line(name, kind, swap.says, why))
            except TypeError as error:  # a metaclass or __init_subclass__ that will not
                lines.append(Line(name, kind, "", f"no class can be derived from its: {error}"))
        elif isinstance(swap, type):
            now[m] = swap
            lines.append(Line(name, kind, swap.__name__))
        elif m in attentions:
            lines.append(Line(name, kind, *attentions[m]))
        elif m in inside:
            lines.append(Line(name, kind, f"in {inside[m]}"))
        else:
            lines.append(Line(name, kind, "", swap or why_left(m)))
    report = Report(lines)
    try:
        for m, new in now.items():
            report.swap(m, new)
        for m in switched:
            report.restore.append(switch_attention(m))
    except Exception:
        report.undo()
        raise
    return report


def _attentions(
    names: dict[nn.Module, str], found: dict[nn.Module, Any]
) -> tuple[list[nn.Module], dict[nn.Module, tuple[str, str]]]:
    """The models of transformers' whose attention is to be switched; and what the lines of the
    attentions in all such models say."""
    inside: set[nn.Module] = set()
    switched, says = [], {}
    for m in names:
        if not pretrained(m) or m in inside:
            continue
        inside.update(m.modules())
        parts = [p for p in m.modules() if asks_interface(p)]
        why = ALONE if any(found.get(p) == ALONE for p in parts) else attention_obstacle(m)
        if why is None and parts:
            switched.append(m)
        for part in parts:
            if not isinstance(found.get(part), Swap):
                runs = 'attention, by attn_implementation="fastgpt"' if why is None else ""
                says[part] = (runs, why or "")
    return switched, says


def why_left(module: nn.Module) -> str:
    """Of a module that is like nothing that is replaced."""
    if linear(module):
        return "a product by itself is the vendor's"
    if isinstance(module, nn.Embedding):
        return "nothing to gain by itself"
    if isinstance(module, nn.Dropout) or activation_module(module):
        return "no neighbour to fuse with"
    return "its own code around its parts" if module._modules else "no op computes it"


def _check(model: nn.Module, wanted: dict[Any, Any]) -> dict[type[nn.Module], Any]:
    """Raise unless the model has weights and replace is of classes."""
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(
                f"patch: the model must have its weights; {name} is on the meta device"
            )
    present = {type(m) for m in model.modules()}
    for old, new in wanted.items():
        for c in (old,) if new is None else (old, new):
            if not (isinstance(c, type) and issubclass(c, nn.Module)):
                raise TypeError(f"patch: replace must map classes of modules to such; got {c!r}")
        if not (new is None or new in AS or issubclass(new, old)):
            allowed = ", ".join(c.__name__ for c in AS)
            raise ValueError(
                f"patch: {old.__name__} may be replaced by fastgpt.layers' {allowed}, a"
                f" class derived from it, or None; got {new.__name__}"
            )
        if old not in present:
            raise ValueError(f"patch: replace names {old.__name__}, of which the model has none")
    return wanted


def _recognise(
    names: dict[nn.Module, str], wanted: dict[type[nn.Module], Any], loss_head: bool
) -> dict[nn.Module, Any]:
    """For each module a Swap, a class, or why there is none."""
    found: dict[nn.Module, Any] = {}
    free = []
    for m, name in names.items():
        if isinstance(m, Patched) or type(m).__module__.startswith("fastgpt."):
            found[m] = "patched already" if isinstance(m, Patched) else "fastgpt's own"
        elif type(m).forward is nn.Module.forward:
            found[m] = "holds others"
        elif isinstance(m, torch.jit.ScriptModule):
            found[m] = "compiled by TorchScript"
        elif "forward" in m.__dict__:
            found[m] = "its forward was exchanged on the object"
        elif type(m) in wanted:
            new = wanted[type(m)]
            found[m] = ALONE if new is None else new
            if new in AS:
                found[m] = AS[new](m)
                if not isinstance(found[m], Swap):
                    raise ValueError(
                        f"patch: {name!r} ({type(m).__name__}) cannot be {new.__name__}: {found[m]}"
                    )
        else:
            free.append(m)
    for m in free:
        found[m] = recognise_norm(m)
    norms: Norms = {}
    for m, swap in found.items():
        how = swap.how if isinstance(swap, Swap) else how_of(m) if isinstance(m, Patched) else None
        if how is not None and (isinstance(m, Patched) or swap.says in ("layer_norm", "rms_norm")):
            norms[m] = how
    for m in free:
        for recognise in (
            recognise_multihead,
            lambda m: recognise_encoder(m, norms),
            lambda m: recognise_attention(m),
            lambda m: recognise_feed_forward(m),
            lambda m: recognise_add_norm(m, norms),
            lambda m: recognise_chunk(m, norms),
            lambda m: recognise_block(m, norms),
            lambda m: recognise_loss_head(m) if loss_head else None,
        ):
            if found[m] is None:
                found[m] = recognise(m)
    return found
