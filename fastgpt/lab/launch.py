"""A launch of a kernel, written down: which function, on what arguments, over what grid.

Everything the lab does starts from one: it is compiled for a chip, run in the interpreter to
count its traffic, run under the sanitizer. A launch comes from a spec (`fastgpt.lab.spec`), from
a program that was recorded (`fastgpt.lab.record`), or from fastgpt's own launchers
(`fastgpt.lab.cases`).
"""

import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
    "i64": torch.int64,
    "i32": torch.int32,
    "u32": torch.uint32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i1": torch.bool,
}
SHORT = {dtype: short for short, dtype in DTYPES.items()}
FILLS = ("randn", "rand", "arange", "zeros", "ones", "nan")


@dataclass(frozen=True)
class TensorArg:
    """A tensor that a launch takes: described, not held.

    Attributes:
        dtype: a key of DTYPES.
        shape, strides: in elements; without strides it is contiguous.
        fill: one of FILLS, or a number. By default floats are drawn from a normal distribution
            and integers are zero.
        values: the elements themselves where the kernel's addresses may depend on them.
        storage: arguments of one number share a storage, at their offsets in elements.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    fill: str | float | None = None
    values: tuple[int, ...] | None = None
    storage: int | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"tensor: the dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}"
            )
        if isinstance(self.fill, str) and self.fill not in FILLS:
            raise ValueError(
                f"tensor: the fill must be a number or one of {', '.join(FILLS)}; got {self.fill!r}"
            )
        if self.strides is not None and len(self.strides) != len(self.shape):
            raise ValueError(
                f"tensor: shape and strides must be of one length; got {self.shape}, {self.strides}"
            )

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def elements(self) -> int:
        """Elements of storage, from the first to the last that the tensor reaches, and offset."""
        if math.prod(self.shape) == 0:
            return self.offset
        if self.strides is None:
            return self.offset + math.prod(self.shape)
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return self.offset + reach + 1

    def draw(self, device: str, rng: torch.Generator) -> Tensor:
        """One dimension of values, as long as the storage."""
        dtype, count = DTYPES[self.dtype], self.elements
        if self.values is not None:
            made = torch.tensor(self.values, dtype=dtype)
        elif isinstance(self.fill, (int, float)):
            made = torch.full((count,), self.fill, dtype=dtype)
        else:
            fill = self.fill or ("randn" if dtype.is_floating_point else "zeros")
            made = {
                "randn": lambda: torch.randn(count, generator=rng).to(dtype),
                "rand": lambda: torch.rand(count, generator=rng).to(dtype),
                "arange": lambda: torch.arange(count).to(dtype),
                "zeros": lambda: torch.zeros(count, dtype=dtype),
                "ones": lambda: torch.ones(count, dtype=dtype),
                "nan": lambda: torch.full((count,), float("nan"), dtype=dtype),
            }[fill]()
        return made.to(device)

    def view(self, storage: Tensor) -> Tensor:
        """The tensor over a storage of its elements."""
        strides = self.strides
        if strides is None:
            strides = torch.empty(self.shape, device="meta").stride()
        return storage.as_strided(self.shape, strides, self.offset)


@dataclass(frozen=True)
class DescriptorArg:
    """A host tensor descriptor (TMA) over a tensor, in blocks of a shape."""

    base: TensorArg
    block: tuple[int, ...]


@dataclass(frozen=True)
class Elements:
    """What a kernel works through, for instructions per element and the budget that memory gives.

    Attributes:
        launch: elements of one launch, all programs; 0 where only a loop is asked about.
        loop: elements of one pass of its loops, 0 where it has none; of a kernel with products
            of one pass of its main loop, the scores of attention for example.
        bytes: of memory that each element needs at least, loads and stores; 0 where not said.
    """

    launch: float = 0.0
    loop: float = 0.0
    bytes: float = 0.0

    def __post_init__(self) -> None:
        if min(self.launch, self.loop, self.bytes) < 0 or not (self.launch or self.loop):
            raise ValueError(
                "elements: launch, loop and bytes must not be negative, and launch or loop above 0;"
                f" got {self.launch}, {self.loop} and {self.bytes}"
            )


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: "path/to/file.py:function" or "package.module:function".
        args: every parameter of the function by name: a TensorArg, a DescriptorArg, a number, a
            bool, None, or what a constexpr may be.
        grid: up to three sizes, or None where there is only a signature: compiled, not run.
        options: num_warps, num_stages and the like.
        name: what reports call it.
        variant: what tells it from others of that name.
        size: what tells its sizes from those of others, "T=256".
        reference: "file.py:function", the same in PyTorch: it takes the tensors and numbers by
            the names of the arguments it has, and returns those written, by name.
        elements: what it works through, if that is to be told.
    """

    kernel: str
    args: dict[str, Any]
    grid: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    variant: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    size: str = ""
    elements: Elements | None = None

    def __post_init__(self) -> None:
        if not self.name:
            where, _, function = self.kernel.partition(":")
            file = where.removesuffix(".py").replace("/", ".").rpartition(".")[2]
            object.__setattr__(self, "name", f"{file}.{function}")

    def tensors(self) -> dict[str, TensorArg]:
        """The tensors among the arguments, those under descriptors too."""
        found = {}
        for name, value in self.args.items():
            if isinstance(value, TensorArg):
                found[name] = value
            elif isinstance(value, DescriptorArg):
                found[name] = value.base
        return found

    def arguments(
        self, device: str = "cpu", seed: int = 0, fill: bool = True
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The arguments themselves, and the tensors among them.

        Args:
            device: where tensors are made.
            seed: of what is drawn.
            fill: whether values matter; without, storage is left as it comes.
        """
        rng = torch.Generator().manual_seed(seed)
        tensors = self.tensors()
        sizes: dict[int, int] = {}
        for arg in tensors.values():
            if arg.storage is not None:
                sizes[arg.storage] = max(sizes.get(arg.storage, 0), arg.elements)
        stores: dict[int, Tensor] = {}
        made: dict[str, Tensor] = {}
        for name, arg in tensors.items():
            if arg.storage is not None and arg.storage in stores:
                store = stores[arg.storage]
            else:
                whole = arg
                if arg.storage is not None and arg.values is None:
                    whole = TensorArg(arg.dtype, (sizes[arg.storage],), fill=arg.fill)
                store = (
                    whole.draw(device, rng)
                    if fill
                    else torch.empty(whole.elements, dtype=DTYPES[arg.dtype], device=device)
                )
                if arg.storage is not None:
                    stores[arg.storage] = store
            made[name] = arg.view(store)
        args = dict(self.args) | made
        for name, value in self.args.items():
            if isinstance(value, DescriptorArg):
                args[name] = descriptor(made[name], value.block)
        return args, made


def descriptor(base: Tensor, block: tuple[int, ...]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(base, list(block))


def written_down(name: str, value: Any, storages: dict[int, int], keep: int = 1 << 16) -> Any:
    """An argument of a real launch as a Launch holds it.

    Args:
        storages: number of every storage seen in this launch, by address; grows.
        keep: integer tensors of up to so many elements are kept with their values, since the
            kernel may make addresses of them.

    Raises:
        ValueError: the argument is of a kind that cannot be written down.
    """
    if isinstance(value, Tensor):
        if value.dtype not in SHORT:
            raise ValueError(f"launch: {name} has a dtype the lab does not know: {value.dtype}")
        address = 0 if value.is_meta else value.untyped_storage().data_ptr()
        arg = TensorArg(
            SHORT[value.dtype],
            tuple(value.shape),
            None if value.is_contiguous() else tuple(value.stride()),
            storage=storages.setdefault(address, len(storages)) if address else None,
            offset=int(value.storage_offset()),
        )
        numbers = not (value.is_floating_point() or value.dtype == torch.bool or value.is_meta)
        if numbers and arg.elements <= keep:
            whole = torch.empty(0, dtype=value.dtype, device="cpu")
            whole.set_(value.detach().cpu().untyped_storage())
            arg = replace(arg, values=tuple(whole[: arg.elements].tolist()))
        return arg
    if type(value).__name__ == "TensorDescriptor":
        base = written_down(name, value.base, storages, keep)
        shape, strides = tuple(value.shape), tuple(value.strides)  # which need not be the tensor's
        return DescriptorArg(replace(base, shape=shape, strides=strides), tuple(value.block_shape))
    if type(value).__name__ == "constexpr":
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value).__module__.startswith("triton.language"):
        return value  # a dtype
    if callable(value):
        return value  # a function that a constexpr takes
    raise ValueError(f"launch: {name} cannot be written down; got {type(value).__name__}")


def split(reference: str) -> tuple[str, str]:
    """ "file.py:function" in its two parts."""
    where, colon, function = reference.rpartition(":")
    if not colon or not function.isidentifier():
        raise ValueError(f"lab: a kernel is named path/to/file.py:function; got {reference!r}")
    return where, function


def load_module(where: str) -> ModuleType:
    """Import a file by path, or a module by name, as its own package would.

    Raises:
        ValueError: there is no such file or module, or importing it fails; says in which line.
    """
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(where).resolve()
        if not path.is_file():
            raise ValueError(f"lab: {where} is not a file")
        package = path.parent
        parts = [path.stem]
        while (package / "__init__.py").is_file():
            parts.insert(0, package.name)
            package = package.parent
        root = str(package)
        if root not in sys.path:
            sys.path.insert(0, root)
        if len(parts) > 1:
            return importlib.import_module(".".join(parts))
        # A file may ask which chip it is on while it is imported: each chip has its own copy.
        chip = getattr(triton.runtime.driver._active, "target", "")
        name = f"fastgpt_lab_{path.stem}_{hash((str(path), chip, path.stat().st_mtime_ns)):x}"
        if name in sys.modules:
            return sys.modules[name]
        found = importlib.util.spec_from_file_location(name, path)
        if found is None or found.loader is None:
            raise ValueError(f"lab: {where} is no Python file")
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module
        try:
            found.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [f.lineno for f in frames if f.filename == str(Path(where).resolve())]
        line = f", line {inside[-1]}" if inside else ""
        why = " ".join(str(error).split())
        raise ValueError(
            f"lab: {where}{line} cannot be imported; {type(error).__name__}: {why}"
        ) from error


def is_kernel(value: Any) -> bool:
    """Whether value is what @triton.jit made, under @triton.autotune or @triton.heuristics too."""
    while type(value).__name__ in ("Autotuner", "Heuristics"):
        value = value.fn
    return type(value).__name__ in ("JITFunction", "GluonJITFunction", "InterpretedFunction")


def kernels_in(module: ModuleType) -> list[str]:
    """Names of the kernels that a module's file defines."""
    return [
        name
        for name, value in vars(module).items()
        if is_kernel(value) and unwrap(value).fn.__module__ == module.__name__
    ]


def unwrap(kernel: Any) -> Any:
    """The function under @triton.autotune and @triton.heuristics."""
    while type(kernel).__name__ in ("Autotuner", "Heuristics"):
        kernel = kernel.fn
    return kernel


def decorators(kernel: Any) -> Iterator[Any]:
    """The Autotuner and Heuristics around a kernel, outermost first."""
    while type(kernel).__name__ in ("Autotuner", "Heuristics"):
        yield kernel
        kernel = kernel.fn


def load(reference: str) -> Any:
    """What "file.py:name" names.

    Raises:
        ValueError: there is no such file, or nothing of this name; says what kernels there are.
    """
    where, name = split(reference)
    module = load_module(where)
    found = getattr(module, name, None)
    if found is None:
        names = kernels_in(module)
        there = f"it has {', '.join(names)}" if names else "it has no @triton.jit function"
        raise ValueError(f"lab: {where} has nothing named {name}; {there}")
    return found


def load_kernel(reference: str) -> Any:
    """The kernel that "file.py:function" names, without its decorators but @triton.jit.

    Raises:
        ValueError: as `load`; or what it names is no kernel.
    """
    found = load(reference)
    if not is_kernel(found):
        raise ValueError(f"lab: {reference} is no @triton.jit function; got {type(found).__name__}")
    return unwrap(found)


def file_of(kernel: Any, file: str, line: int) -> str:
    """The file of a line of compiled code, as it is here.

    Triton's cache goes by a function's source and first line and not by its path: what it gives
    may be compiled from the same function in a file elsewhere, and name that.

    Args:
        kernel: the @triton.jit function that was compiled.
        file, line: as the compiled code names them.
    """
    functions = [
        f for f in (kernel, *kernel.fn.__globals__.values()) if type(f).__name__ == "JITFunction"
    ]
    here = {f.fn.__code__.co_filename for f in functions}
    if file in here or "/triton/language/" in file:
        return file
    for f in functions:
        if 0 <= line - f.starting_line_number < len(f.raw_src):
            return str(f.fn.__code__.co_filename)
    return file


def check_names(launch: Launch, names: list[str], optional: set[str]) -> None:
    """That a launch's arguments are those of the signature.

    Raises:
        ValueError: one is missing, or one is not there.
    """
    missing = [n for n in names if n not in launch.args and n not in optional]
    extra = [n for n in launch.args if n not in names]
    said = [f"missing {', '.join(missing)}"] if missing else []
    said += [f"unknown {', '.join(extra)}"] if extra else []
    if said:
        raise ValueError(
            f"lab: the arguments of {launch.name} are {', '.join(names)}; {'; '.join(said)}"
        )
