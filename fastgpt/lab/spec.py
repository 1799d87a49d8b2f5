"""A launch as a person writes it: Python, YAML or the command line.

    kernel: add.py:add_kernel
    sizes: {N: 4096}
    args:
      x_ptr: bf16[N]                    # a tensor; f32[M, N] = zeros fills it
      y_ptr: bf16[N]
      out_ptr: bf16[N]
      n: N                              # a number: an expression of the sizes
      BLOCK: 1024                       # a constexpr
    grid: [cdiv(N, BLOCK)]
    options: {num_warps: 4}

Without shapes a signature is enough to compile: "*bf16" is a pointer, "i32" a number, "i32:16" a
number divisible by 16, as in Triton's ahead-of-time compiler.
"""

import ast
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastgpt.lab.launch import (
    DTYPES,
    DescriptorArg,
    Elements,
    Launch,
    TensorArg,
    check_names,
    decorators,
    is_kernel,
    load,
    unwrap,
)

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "cdiv": lambda a, b: -(-a // b),
    "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
    "min": min,
    "max": max,
    "sqrt": math.sqrt,
    "log2": math.log2,
}
TENSOR = re.compile(r"(?P<dtype>\w+)\s*\[(?P<shape>[^\]]*)\]\s*(?:=\s*(?P<fill>[\w.+-]+))?$")
POINTER = re.compile(r"\*(?P<dtype>\w+)$")
NUMBER = re.compile(r"(?P<type>[iu](?:32|64)|f32|f64)(?P<aligned>:16)?$")
KEYS = {"kernel", "name", "sizes", "args", "grid", "options", "grow", "reference", "elements"}


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression of numbers, names, comparisons and `FUNCTIONS`; runs no code.

    Raises:
        ValueError: it is no such expression, or a name in it is not known.
    """

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression():
                return value(node.body)
            case ast.Constant():
                return node.value
            case ast.Name():
                if node.id not in names:
                    raise ValueError(
                        f"expression {text!r}: known are {', '.join(names)}; got {node.id!r}"
                    )
                return names[node.id]
            case ast.Tuple() | ast.List():
                return tuple(value(e) for e in node.elts)
            case ast.BinOp() if type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](value(node.left), value(node.right))
            case ast.UnaryOp() if type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](value(node.operand))
            case ast.BoolOp():
                every = isinstance(node.op, ast.And)
                return (all if every else any)(value(v) for v in node.values)
            case ast.Compare() if all(type(o) in OPERATORS for o in node.ops):
                terms = [value(node.left), *(value(c) for c in node.comparators)]
                pairs = zip(node.ops, itertools.pairwise(terms), strict=True)
                return all(OPERATORS[type(o)](a, b) for o, (a, b) in pairs)
            case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS and not node.keywords:
                return FUNCTIONS[name](*(value(a) for a in node.args))
        raise ValueError(f"expression {text!r}: {ast.unparse(node)!r} is not allowed")

    try:
        return value(ast.parse(text.strip(), mode="eval"))
    except SyntaxError as error:
        raise ValueError(f"expression {text!r}: {error.msg}") from None
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"expression {text!r}: {error}") from None


@dataclass(frozen=True)
class Spec:
    """A kernel and how to launch it; every number may be an expression of `sizes`.

    Attributes:
        kernel: "path/to/file.py:function" or "package.module:function".
        args: by parameter: "bf16[M, N]" a tensor, "*bf16" a pointer, "i32" or "i32:16" a number,
            a number itself, an expression, True, False, None, or
            {"tensor": "bf16[M, N]", "strides": ["2 * N", 1]},
            {"descriptor": "bf16[M, N]", "block": [128, 64]}.
        grid: sizes of the grid; names of constexprs may be used. Without one it is only compiled.
        options: num_warps, num_stages, ...
        sizes: the numbers that expressions use.
        grow: other values of sizes, for traffic and numbers: {"N": [1024, 2048, 4096]}.
        name: what reports call it.
        reference: "file.py:function", the same in PyTorch.
        elements: {"launch": "M * N", "loop": "ROWS * N", "bytes": 4}: elements of the launch, of
            one pass of its loops, and the bytes that each needs at least; see `launch.Elements`.
    """

    kernel: str
    args: dict[str, Any]
    grid: Sequence[int | str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    grow: dict[str, list[int]] = field(default_factory=dict)
    name: str = ""
    reference: str | None = None
    elements: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        lengths = {len(values) for values in self.grow.values()}
        if len(lengths) > 1:
            raise ValueError(f"spec: lists under grow must be of one length; got {self.grow}")
        unknown = [name for name in self.grow if name not in self.sizes]
        if unknown:
            raise ValueError(f"spec: grow has {', '.join(unknown)}, which sizes has not")

    def launches(self, configs: str = "first") -> list[Launch]:
        """The launches of this spec: one, or one for each configuration of @triton.autotune.

        Args:
            configs: "first" or "all" of them; what args and options say goes before.

        Raises:
            ValueError: the kernel cannot be loaded; an argument is missing, unknown or unclear.
        """
        found = load(self.kernel)
        if not is_kernel(found):
            raise ValueError(f"lab: {self.kernel} is no @triton.jit function")
        function = unwrap(found)
        tuned: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {})]
        heuristics: dict[str, Callable[[dict[str, Any]], Any]] = {}
        for wrapper in decorators(found):
            if type(wrapper).__name__ == "Heuristics":
                heuristics |= wrapper.values
            elif hasattr(wrapper, "configs"):
                chosen = wrapper.configs if configs == "all" else wrapper.configs[:1]
                tuned = [
                    (c.kwargs, {"num_warps": c.num_warps, "num_stages": c.num_stages})
                    for c in chosen
                ]
        return [self._launch(function, *one, heuristics) for one in tuned]

    def _launch(
        self,
        function: Any,
        constexprs: dict[str, Any],
        options: dict[str, Any],
        heuristics: dict[str, Callable[[dict[str, Any]], Any]],
    ) -> Launch:
        parameters = {p.name: p for p in function.params}
        names: dict[str, Any] = dict(self.sizes)
        args: dict[str, Any] = dict(constexprs)
        for name, said in self.args.items():
            args[name] = _argument(name, said, names)
            if isinstance(args[name], (int, float)):
                names.setdefault(name, args[name])
        names |= {k: v for k, v in args.items() if isinstance(v, (int, float))}
        for name, heuristic in heuristics.items():
            if name not in args:
                args[name] = heuristic(args)
        optional = {n for n, p in parameters.items() if p.has_default}
        launch = Launch(
            kernel=self.kernel,
            args=args,
            grid=self._grid(names),
            options=options | self.options,
            name=self.name,
            variant=dict(constexprs)
            | {n: args[n] for n in args if n in parameters and parameters[n].is_constexpr},
            reference=self.reference,
            size=", ".join(f"{name}={size}" for name, size in self.sizes.items()),
            elements=elements(self.elements, names) if self.elements else None,
        )
        check_names(launch, list(parameters), optional)
        return launch

    def _grid(self, names: dict[str, Any]) -> tuple[int, ...] | None:
        if self.grid is None:
            return None
        grid = tuple(int(evaluate(str(g), names)) for g in self.grid)
        if not 1 <= len(grid) <= 3 or min(grid) < 1:
            raise ValueError(f"spec: the grid must have one to three sizes above 0; got {grid}")
        return grid

    def sized(self) -> "list[Spec]":
        """This spec at each size of `grow`, or as it is."""
        if not self.grow:
            return [self]
        count = len(next(iter(self.grow.values())))
        return [
            replace(self, sizes=self.sizes | {n: v[i] for n, v in self.grow.items()}, grow={})
            for i in range(count)
        ]


def elements(said: Mapping[str, Any], names: Mapping[str, Any]) -> Elements:
    """What a kernel works through, from expressions of sizes and arguments.

    Raises:
        ValueError: a key is none of launch, loop and bytes, or an expression is none.
    """
    if unknown := set(said) - {"launch", "loop", "bytes"}:
        raise ValueError(f"spec: elements has launch, loop, bytes; got {', '.join(unknown)}")
    return Elements(**{key: float(evaluate(str(value), names)) for key, value in said.items()})


def _argument(name: str, said: Any, names: Mapping[str, Any]) -> Any:
    """One argument from what the spec says."""
    if isinstance(said, Mapping):
        kinds = {
            "tensor": {"tensor", "strides", "offset", "values"},
            "descriptor": {"descriptor", "block"},
        }
        kind = next((k for k in kinds if k in said), None)
        if kind is None or set(said) - kinds[kind]:
            raise ValueError(
                f"spec: {name} must be {{tensor, strides, offset, values}} or "
                f"{{descriptor, block}}; got {', '.join(map(str, said))}"
            )
        base = _argument(name, said[kind], names)
        if not isinstance(base, TensorArg):
            raise ValueError(f"spec: {name} must be a tensor; got {said[kind]!r}")
        if kind == "descriptor":
            return DescriptorArg(base, _numbers(said["block"], names))
        if "strides" in said:
            base = replace(base, strides=_numbers(said["strides"], names))
        if "offset" in said:
            base = replace(base, offset=int(evaluate(str(said["offset"]), names)))
        if "values" in said:
            base = replace(base, values=tuple(said["values"]))
        return base
    if not isinstance(said, str):
        return said
    if m := TENSOR.match(said):
        shape = _numbers([s for s in m["shape"].split(",") if s.strip()], names)
        fill = m["fill"]
        with_number = fill is not None and re.fullmatch(r"[-+\d.][\w.+-]*", fill)
        return TensorArg(m["dtype"], shape, fill=float(fill) if with_number else fill)
    if m := POINTER.match(said):
        if m["dtype"] not in DTYPES:
            raise ValueError(f"spec: {name} must point to one of {', '.join(DTYPES)}; got {said!r}")
        return TensorArg(m["dtype"], (16,))
    if m := NUMBER.match(said):
        if m["type"].startswith("f"):
            return 0.5
        aligned = 1 << 12 if m["aligned"] else 12345
        return aligned + ((1 << 40) if m["type"].endswith("64") else 0)
    if m := re.fullmatch(r"tl\.(\w+)", said):
        import triton.language as tl

        return getattr(tl, m[1])
    if said in names or re.search(r"[()+*/ -]", said):
        return evaluate(said, names)
    return said


def _numbers(said: Sequence[Any], names: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(evaluate(str(s), names)) for s in said)


def from_mapping(said: Any, folder: Path) -> Spec:
    """A spec from what YAML holds; the kernel's file is looked for beside the spec.

    Raises:
        ValueError: it has no kernel or args, or a key that no spec has.
    """
    if not isinstance(said, Mapping) or "kernel" not in said or "args" not in said:
        raise ValueError(f"spec: it must have kernel and args; got {said!r}"[:200])
    if unknown := set(map(str, said)) - KEYS:
        raise ValueError(f"spec: keys are {', '.join(sorted(KEYS))}; got {', '.join(unknown)}")
    said = dict(said)
    for key in ("kernel", "reference"):
        where, _, function = str(said.get(key, "")).rpartition(":")
        if where.endswith(".py") and not Path(where).is_absolute():
            said[key] = f"{folder / where}:{function}"
    return Spec(**said)


def read(path: str | Path) -> list[Spec]:
    """The specs of a YAML file: one, or a list of them.

    Raises:
        ValueError: the file is not YAML or holds no spec.
    """
    import yaml

    path = Path(path)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"spec: {path} is no YAML; {' '.join(str(error).split())}") from None
    several = found if isinstance(found, list) else [found]
    return [from_mapping(one, path.resolve().parent) for one in several]
