"""What a module's forward does with its submodules, found out by torch.fx without running them."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastgpt.patching.swap import own_forward, stand_in

MORE = "fastgpt_more"  # an argument that nobody has, to see where **kwargs go


class _Tracer(fx.Tracer):
    """Records calls of submodules, whatever is in them, and what happens between."""

    def __init__(
        self, module: nn.Module, given: dict[str, Any], names: tuple[str, ...], method: Any
    ) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True  # what is done to a buffer is a step too
        self.module, self.given, self.names, self.method = module, given, names, method
        self.paths = {id(m): name for name, m in module.named_modules()}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.method is None or not m._modules

    def path_of_module(self, mod: nn.Module) -> str:
        # A lambda that forward calls may hold on to the module's own layers, not the twin's.
        return self.paths[id(mod)] if id(mod) in self.paths else super().path_of_module(mod)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        asked = {name: self.create_proxy("placeholder", name, (), {}) for name in self.names}
        f = self.method or own_forward(self.module)
        return lambda: f(self.root, **asked, **self.given), []


def parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    """Of its forward, without self."""
    return list(inspect.signature(own_forward(module)).parameters.values())[1:]


class Steps(list[fx.Node]):
    """The steps of a forward, inputs first and the output last; and what its probabilities of
    dropout, of which it may pass any to a function, are called on the module."""

    def __init__(self, nodes: list[fx.Node], module: nn.Module, drops: dict[float, str]) -> None:
        super().__init__(nodes)
        self.module, self.drops = module, drops

    @property
    def result(self) -> Any:
        """What forward returns: a step, or a tuple of them."""
        return self[-1].args[0]

    @property
    def between(self) -> int:
        """How many steps there are beside inputs and output."""
        return sum(node.op not in ("placeholder", "output") for node in self)

    def called(self, node: Any) -> nn.Module | None:
        """The submodule that a step calls with one tensor, if that is what it is."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        return self.module.get_submodule(str(node.target))

    def dropped(self, node: Any) -> tuple[str, Any]:
        """If a step is dropout, the submodule or the attribute that has its probability, and what
        it is of; else "" and the step."""
        if isinstance(self.called(node), nn.Dropout):
            return str(node.target), node.args[0]
        if isinstance(node, fx.Node) and node.target is F.dropout and node.args:
            keywords = dict(zip(("p", "training", "inplace"), node.args[1:], strict=False))
            keywords |= node.kwargs
            name = self.drops.get(keywords.get("p"), "")  # type: ignore[arg-type]
            if name and keywords.get("training") is True and not keywords.get("inplace"):
                return name, node.args[0]
        return "", node

    def added(self, node: Any) -> tuple[Any, Any] | None:
        """The two terms, if a step is a sum."""
        if not isinstance(node, fx.Node) or node.kwargs or len(node.args) != 2:
            return None
        if node.target not in (operator.add, operator.iadd, torch.add):
            return None
        a, b = node.args
        return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _forget_rows(graph: fx.Graph) -> None:
    """Take out y = x.reshape(-1, x.size(-1)) if the result is brought back by .view(x.shape)."""
    *_, output = graph.nodes
    last = output.args[0]
    if not isinstance(last, fx.Node) or last.target not in ("view", "reshape"):
        return
    shape = last.args[1]
    if not isinstance(shape, fx.Node) or shape.args[1:] != ("shape",):
        return
    x = shape.args[0]
    for node in graph.nodes:
        if node.target in ("view", "reshape") and node.args[:2] == (x, -1) and len(node.args) == 3:
            size = node.args[2]
            if isinstance(size, fx.Node) and size.target == "size" and size.args == (x, -1):
                node.replace_all_uses_with(x)
                output.replace_input_with(last, last.args[0])
                graph.erase_node(last)
                graph.erase_node(node)
                return


def trace(
    module: nn.Module, names: tuple[str, ...], given: dict[str, Any] | None = None,
    method: Callable[..., Any] | None = None,
) -> Steps | str:  # fmt: skip
    """The steps of forward(names..., **given) in training mode, sizes and items that are not used
    left out; or why it cannot be followed. Instead of forward another method can be followed, and
    then into the submodules too."""
    twin = stand_in(module, lambda _, t: torch.empty(t.shape, dtype=t.dtype, device="meta"))
    twin.training = True
    drops = {}
    for i, (name, value) in enumerate(sorted(twin.__dict__.items(), key=lambda item: item[0])):
        if "drop" in name and isinstance(value, float):
            twin.__dict__[name] = p = (i + 1) / 1024
            drops[p] = name
    try:
        graph = _Tracer(module, given or {}, names, method).trace(twin)
    except Exception as error:  # forward is anybody's code, and may raise anything on a proxy
        return f"its forward cannot be followed ({type(error).__name__})"
    _forget_rows(graph)
    for node in reversed(graph.nodes):
        if not node.users and node.target in (operator.getitem, getattr, "size"):
            graph.erase_node(node)
    return Steps(list(graph.nodes), module, drops)
