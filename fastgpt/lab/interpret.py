"""Run a launch in Triton's interpreter, on tensors of the CPU, as compiled code would run it.

For a process with TRITON_INTERPRET=1 that does nothing else (see `fastgpt.lab.child`): what is
changed of the interpreter stays changed. Five things it does otherwise are mended here:

    bfloat16    it multiplies the raw bits in tl.dot; float16 stands in, as many bytes
    floats      an argument stays a Python float, on which `eps.to(tl.float32)` fails
    range       Triton 3.6 with NumPy 2.4 takes no integer argument as a bound
    masks       Triton 3.9 spreads a bool as integers, and loads by masks of bool alone
    libdevice   rsqrt, tanh and the rest give None, or cannot run; PyTorch's stand in
"""

import functools
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch

from fastgpt.lab import child
from fastgpt.lab.launch import DescriptorArg, Launch, TensorArg, load_kernel

# Functions of libdevice, by their names in PyTorch.
_IN_TORCH = {
    name: name
    for name in (
        "rsqrt sqrt exp exp2 expm1 log log2 log10 log1p sin cos tan tanh sinh cosh asin acos atan"
        " atan2 asinh acosh atanh erf erfc erfinv lgamma pow fmod hypot floor ceil trunc copysign"
        " fmax fmin"
    ).split()
} | {
    "fabs": "abs", "rint": "round", "nearbyint": "round", "fast_expf": "exp", "fast_logf": "log",
    "fast_log2f": "log2", "fast_sinf": "sin", "fast_cosf": "cos", "fast_tanhf": "tanh",
    "fast_powf": "pow", "fast_dividef": "div", "div_rn": "div", "sqrt_rn": "sqrt",
    "rsqrt_rn": "rsqrt",
}  # fmt: skip


def run(launch: Launch, args: dict[str, Any]) -> None:
    """Run a launch on its arguments, which it changes.

    Raises:
        ValueError: the launch has no grid, or the kernel failed; says in which line.
    """
    if launch.grid is None:
        raise ValueError(f"lab: {launch.name} has no grid: it can be compiled, but not run")
    mend()
    from triton.runtime.errors import InterpreterError

    kernel = load_kernel(launch.kernel)
    file = kernel.fn.__code__.co_filename
    try:
        with np.errstate(all="ignore"):
            kernel[launch.grid](**args, **launch.options)
    except InterpreterError as error:
        cause = error.__cause__ or error
        lines = [f.lineno for f in traceback.extract_tb(cause.__traceback__) if f.filename == file]
        where = f"line {lines[-1]}: " if lines else ""
        raise ValueError(f"the interpreter stopped: {where}{child.one_line(cause)}") from error


def without_bfloat16(launch: Launch) -> Launch:
    """The launch with float16 wherever it has bfloat16."""

    def swapped(value: Any) -> Any:
        if isinstance(value, TensorArg) and value.dtype == "bf16":
            return replace(value, dtype="f16")
        if isinstance(value, DescriptorArg):
            return replace(value, base=swapped(value.base))
        if type(value).__module__ == "triton.language.core" and str(value) == "bf16":
            return import_module("triton.language").float16
        return value

    return replace(launch, args={name: swapped(value) for name, value in launch.args.items()})


@functools.cache
def mend() -> None:
    """Change the interpreter, for the rest of the process."""
    import triton.language as tl
    from triton.runtime import interpreter as own

    convert, patch = own._implicit_cvt, own._patch_lang_tensor

    def converted(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        handle = own.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    splat = own.InterpreterBuilder.create_splat

    def splatted(self: Any, kind: Any, arg: Any) -> Any:
        made = splat(self, kind, arg)
        if kind.scalar != tl.int1:
            return made
        return own.TensorHandle(made.data.astype(bool), tl.int1)

    own._implicit_cvt, own._patch_lang_tensor = converted, patched
    own.InterpreterBuilder.create_splat = splatted
    # Before the kernel's module is imported: it may take the functions by name.
    for where in ("triton.language.extra.libdevice", "triton.language.extra.cuda.libdevice"):
        library = import_module(where)
        for name, known in _IN_TORCH.items():
            if hasattr(library, name):
                setattr(library, name, _by_torch(getattr(torch, known)))


def _by_torch(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A function of PyTorch's on what the interpreter holds."""
    import triton.language as tl
    from triton.runtime import interpreter as own

    def run(*given: Any, _semantic: Any = None) -> Any:
        tensors = [own.interpreter_semantic.to_tensor(x) for x in given]
        values = [torch.from_numpy(np.array(x.handle.data)) for x in tensors]
        made = function(*values).numpy()
        kind = max((x.dtype for x in tensors), key=lambda dtype: dtype.primitive_bitwidth)
        block = any(x.type.is_block() for x in tensors)
        handle = own.TensorHandle(made, kind)
        return tl.tensor(handle, tl.block_type(kind, list(made.shape)) if block else kind)

    return run
