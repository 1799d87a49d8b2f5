"""Feed-forwards: down(act(up(x))), and gated down(act(gate(x)) * up(x)), with dropout after."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastgpt import ops
from fastgpt.ops.ffn import ACTIVATIONS, activate
from fastgpt.patching.swap import Patched, Swap, at, fusable, kind, obstacle, own_forward
from fastgpt.patching.trace import Steps, parameters_of, trace


@dataclass(frozen=True)
class FeedForwardHow:
    """The submodules' names, and the types that they must still have when they are used.

    up is what the gate multiplies if there is one; act is "" where the activation is a function.
    """

    up: str
    down: str
    gate: str
    act: str
    dropout: str
    activation: str
    types: tuple[type[nn.Module], ...]  # of its parts

    @property
    def parts(self) -> tuple[str, ...]:
        """The submodules that the op does the work of: up, down, gate, act, as far as there are."""
        return tuple(name for name in (self.up, self.down, self.gate, self.act) if name)


def conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer whose weight is kept as (in, out)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def linear(layer: nn.Module | None) -> bool:
    """Whether it computes x W^T + b and nothing else."""
    if layer is None:
        return False
    return own_forward(layer) is nn.Linear.forward or conv1d(layer)


def weights(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(out, in), as nn.Linear keeps it or a view, and the bias."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return (weight.T if conv1d(layer) else weight), layer.bias  # type: ignore[return-value]


def activation_of(f: Callable[[Tensor], Any]) -> str | None:
    """The name of the activation that f computes, by trying it in float64."""
    x = torch.linspace(-8.0, 8.0, 1001, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            y = f(x)
    except Exception:  # anybody's code
        return None
    if not isinstance(y, Tensor) or y.dtype != x.dtype or y.shape != x.shape:
        return None
    for name in ACTIVATIONS:
        if torch.allclose(y, activate(x, name), rtol=1e-8, atol=1e-8):
            return name
    return None


def activation_module(module: nn.Module | None) -> str | None:
    """Of a module with nothing to it but an activation."""
    if module is None or next(module.parameters(), None) is not None:
        return None
    return activation_of(lambda x: own_forward(module)(module, x))


class PatchedFeedForward(Patched):
    """A feed-forward on ops.ffn. Hooks on its layers, or other layers in their place, as an adapter
    puts them there, bring its own forward back."""

    def run(self, x: Tensor) -> Any:
        how: FeedForwardHow = self._fastgpt_how
        layers = tuple(at(self, name) for name in how.parts)
        if not fusable(layers, how.types):
            return self.original(x)
        return drop(self, how.dropout, feed_forward(how, layers, x))


def drop(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """Dropout as the submodule or the attribute of that name has it; "" is none."""
    if not name:
        return x
    p = at(module, name)
    if isinstance(p, nn.Module):
        y: Tensor = p(x)
        return y
    return F.dropout(x, p, module.training)


def feed_forward(how: FeedForwardHow, layers: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    """ops.ffn of x with the layers up, down and perhaps gate."""
    w_gate, b_gate = weights(layers[2]) if how.gate else (None, None)
    (w1, b1), (w2, b2) = weights(layers[0]), weights(layers[1])
    return ops.ffn(
        x, w1, b1, w2, b2, activation=how.activation, w_gate=w_gate, b_gate=b_gate
    )  # fmt: skip


def _activation_step(steps: Steps, node: Any) -> tuple[str, str, Any] | None:
    """A step that is an activation: its name, the submodule's name or "", and what it is of."""
    layer = steps.called(node)
    if layer is not None:
        name = activation_module(layer)
        return None if name is None else (name, str(node.target), node.args[0])
    if not isinstance(node, fx.Node) or node.all_input_nodes != list(node.args[:1]):
        return None
    if node.op == "call_function" and callable(node.target):
        f = node.target
    elif node.op == "call_method" and isinstance(node.target, str):
        f = getattr(Tensor, node.target)
    else:
        return None
    name = activation_of(lambda x: f(x, *node.args[1:], **node.kwargs))
    return None if name is None else (name, "", node.args[0])


def _linear_step(steps: Steps, node: Any) -> tuple[str, Any] | None:
    """A step that calls a linear layer: its name, and what it is of."""
    return (str(node.target), node.args[0]) if linear(steps.called(node)) else None


def match(steps: Steps, node: Any) -> tuple[FeedForwardHow, fx.Node] | str:
    """The feed-forward whose result a step is, and the step that it is of."""
    down = _linear_step(steps, node)
    if down is None:
        return "its forward does not end in a linear layer"
    act, gate, up = _activation_step(steps, down[1]), None, None
    if act is not None:
        up = _linear_step(steps, act[2])
    elif isinstance(down[1], fx.Node) and down[1].target in (operator.mul, torch.mul):
        for a, b in (down[1].args[:2], down[1].args[1::-1]):
            act = act or _activation_step(steps, a)
            if act is not None:
                gate, up = _linear_step(steps, act[2]), _linear_step(steps, b)
                break
        if gate is None or up is None or gate[1] is not up[1]:
            up = None
    if act is None:
        return f"its activation is none of {', '.join(ACTIVATIONS)}"
    if up is None:
        return "its forward is not up, activation, down"
    names = (up[0], down[0], "" if gate is None else gate[0], act[1])
    layers = [steps.module.get_submodule(name) for name in names if name]
    why = obstacle(*(p for m in layers for p in m.parameters(recurse=False)))
    if why is not None:
        return why
    if any("forward" in m.__dict__ for m in layers):
        return "the forward of a layer in it was exchanged on the object"
    return FeedForwardHow(*names, "", act[0], tuple(kind(m) for m in layers)), up[1]


def recognise_feed_forward(module: nn.Module, asked: bool = False) -> Swap | str | None:
    """A swap if module's forward(x) is a feed-forward; why not if it only looks like one; else
    None. If asked, any module is looked at."""
    rest = [m for m in module.children() if not linear(m)]
    looks = len(list(module.children())) - len(rest) in (2, 3) and not any(
        True for m in rest for _ in m.parameters()
    )
    if not asked and (not looks or any(p is not None for p in module._parameters.values())):
        return None
    takes = parameters_of(module)
    if len(takes) != 1:
        return "its forward does not take x alone" if asked else None
    steps = trace(module, (takes[0].name,))
    if isinstance(steps, str):
        return steps
    dropout, node = steps.dropped(steps.result)
    found = match(steps, node)
    if isinstance(found, str):
        return found
    how, x = found
    # One step a layer: nothing else happens in between.
    count = len(how.types) + (not how.act) + bool(how.gate) + bool(dropout)
    if x is not steps[0] or steps.between != count:
        return "its forward does more than a feed-forward"
    how = replace(how, dropout=dropout)
    return Swap(PatchedFeedForward, how, says(how), how.parts)


def says(how: FeedForwardHow) -> str:
    """The report's words."""
    return f"ffn ({'gated ' if how.gate else ''}{how.activation})"
