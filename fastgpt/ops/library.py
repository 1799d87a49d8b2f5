"""The torch.library namespace `fastgpt`: every op has one implementation for all devices.

An implementation chooses kernel or plain PyTorch by `backend.runs_kernel`. Registering one under
"CUDA" and another under "CPU" would not do: under the sanitizer the dispatcher sees CPU tensors.
"""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload

_lib = torch.library.Library("fastgpt", "DEF")
implementations: dict[str, Callable[..., Any]] = {}
_flops: dict[str, Callable[..., Any]] = {}
Fn = TypeVar("Fn", bound=Callable[..., Any])


def define(schema: str) -> OpOverload:
    """Declare an op: "name(Tensor x, ...) -> Tensor". What comes back is it, to call."""
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: OpOverload = getattr(torch.ops.fastgpt, schema.partition("(")[0]).default
    return op


def impl(name: str) -> Callable[[Fn], Fn]:
    """Implement a declared op, for every device, below autograd."""

    def register(fn: Fn) -> Fn:
        _lib.impl(name, fn, "CompositeExplicitAutograd")
        implementations[name] = fn
        return fn

    return register


def fake(name: str) -> Callable[[Fn], Fn]:
    """Give a declared op its shapes and dtypes without data, for tracing."""

    def register(fn: Fn) -> Fn:
        torch.library.register_fake(f"fastgpt::{name}", fn, lib=_lib)
        return fn

    return register


def flops(name: str) -> Callable[[Fn], Fn]:
    """Say what a declared op costs, as a function of its arguments with shapes for tensors."""

    def remember(fn: Fn) -> Fn:
        _flops[name] = fn
        return fn

    return remember


def register_flop_formulas() -> None:
    """Teach torch's FlopCounterMode, in counters made from now on, what fastgpt's ops cost.

    It happens by itself when torch.utils.flop_counter is imported, before or after fastgpt.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _flops.items():
        op = getattr(torch.ops.fastgpt, name)
        if op not in flop_registry:
            register_flop_formula(op)(formula)


class _FlopCounterToCome(MetaPathFinder):
    """Registers the formulas once torch's counter is imported, which fastgpt does not do for their
    sake: it imports triton. A counter copies the formulas when it is made, so the first use of an
    op would be too late."""

    name = "torch.utils.flop_counter"

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                register_flop_formulas()

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def teach_flop_counter() -> None:
    """Register the formulas now if torch's counter is there, else when it comes."""
    if _FlopCounterToCome.name in sys.modules:
        register_flop_formulas()
    elif not any(isinstance(finder, _FlopCounterToCome) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FlopCounterToCome())
