"""The torch.library namespace `fastgpt`: every op has one implementation for all devices.

An implementation chooses kernel or plain PyTorch by `backend.runs_kernel`. Registering one under
"CUDA" and another under "CPU" would not do: under the sanitizer the dispatcher sees CPU tensors.
"""

from collections.abc import Callable
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

    Importing fastgpt does it if torch.utils.flop_counter is loaded by then. It does not load it:
    that module imports triton.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _flops.items():
        op = getattr(torch.ops.fastgpt, name)
        if op not in flop_registry:
            register_flop_formula(op)(formula)
