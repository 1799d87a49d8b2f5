"""How a module of somebody else's comes to run another forward, and stays itself.

Its class becomes one derived from it: same name, same isinstance, same attributes, one method more.
The object, its parameters, buffers, hooks and submodules are not touched, and giving it its class
back is all that undoing takes. The new classes are made when they are needed; a module of one is
copied and pickled by the name of its own class and of what was added.
"""

import copyreg
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgpt import huggingface


class Patched(nn.Module):
    """What stands before a module's own class: `run` may always call `original` instead."""

    _fastgpt_was: ClassVar[type[nn.Module]]
    _fastgpt_how: ClassVar[Any]  # what recognising the module has found out, hashable

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return self._fastgpt_was.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        made, args, *state = reduced
        if made is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return made, args, *state
        mine, *rest = args
        return _new, (self._fastgpt_was, mine.__mro__[1], self._fastgpt_how, *rest), *state


@dataclass(frozen=True)
class Swap:
    """A module's fused forward: the mixin, what it was told, and the report's words for it."""

    mixin: type[Patched]
    how: Any
    says: str
    takes: tuple[str, ...] = ()  # submodules, by name, that it does the work of


@cache
def patched_class(was: Any, mixin: Any, how: Any) -> type[Patched]:
    """The class of the modules of class `was` that run mixin's forward; one for all that agree."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.run(self, *args, **kwargs)

    # By this transformers' Trainer finds out which columns of a data set a model takes.
    forward.__signature__ = inspect.signature(was.forward)  # type: ignore[attr-defined]
    names = {
        "_fastgpt_was": was, "_fastgpt_how": how, "forward": forward, "__doc__": was.__doc__,
        "__module__": was.__module__, "__qualname__": was.__qualname__,
    }  # fmt: skip
    return type(was.__name__, (mixin, was), names)


def _new(was: type[nn.Module], mixin: type[Patched], how: Any, *args: Any) -> nn.Module:
    """What unpickling begins with: an empty module of the patched class."""
    if was.__module__.startswith("transformers."):
        huggingface.register()  # the model's configuration may ask for it
    made: Any = patched_class(was, mixin, how)  # type: ignore[arg-type]
    new: nn.Module = made.__new__(made, *args)
    return new


def unhooked(*modules: nn.Module) -> bool:
    """Whether calling these modules is running their forward and no more."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        or "forward" in m.__dict__
        for m in modules
    )  # fmt: skip


def kind(module: nn.Module) -> type[nn.Module]:
    """Its class, or what that was before it was patched."""
    return module._fastgpt_was if isinstance(module, Patched) else type(module)


def fusable(layers: tuple[nn.Module, ...], types: tuple[type[nn.Module], ...]) -> bool:
    """Whether what was recognised still stands: no other layers since, and no hooks on them."""
    return all(kind(m) is t for m, t in zip(layers, types, strict=True)) and unhooked(*layers)


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The function that module's class was written with, without patch and without decorators."""
    forward: Callable[..., Any] = inspect.unwrap(kind(module).forward)
    return forward


def obstacle(*tensors: Tensor | None) -> str | None:
    """Why weights cannot be read as plain ones, or None."""
    for t in tensors:
        if t is None:
            continue
        if type(t) not in (nn.Parameter, Tensor):
            return f"a weight is a {type(t).__name__}"
        if not t.is_floating_point():
            return f"a weight is {t.dtype}"
    return None


def at(module: nn.Module, name: str) -> Any:
    """The submodule, or the attribute, of a dotted name."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def stand_in(module: nn.Module, change: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A twin to try things on: own tensors, in evaluation mode, and no hooks anywhere."""
    kind: Any = type(module)
    twin: nn.Module = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    for name in HOOKS:
        twin.__dict__[name] = OrderedDict()
    twin.__dict__["training"] = False
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {
            name: None if t is None else change(name, t.detach())
            for name, t in module.__dict__[kind].items()
        }
    twin.__dict__["_modules"] = {
        name: None if m is None else stand_in(m, change) for name, m in module._modules.items()
    }
    return twin


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 on the CPU, with no step of torch's own generator."""
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), device="cpu"
    )
