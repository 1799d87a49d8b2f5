"""Errors against float64, and the law that says which are allowed.

A result in some dtype may err at most twice what PyTorch errs in that dtype, plus 1e-5:

    |kernel - truth| <= 2 * |PyTorch - truth| + 1e-5

each the largest over the elements; the truth is PyTorch's in float64, on inputs that the dtype can
hold. fastgpt's ops are compared at drawn shapes, outputs and every gradient; a launch
with a PyTorch reference of its own in what it writes. float32 and float16 run in Triton's
interpreter, which multiplies the raw bits of bfloat16; that runs under ttsem.
"""

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops as fused
from fastgpt import quantized
from fastgpt.lab import child, interpret, semantics
from fastgpt.lab.launch import DTYPES, SHORT, Launch, load
from fastgpt.lab.result import Checked, Number
from fastgpt.lab.traffic import metered, size
from fastgpt.ops import backend

FACTOR, ATOL = 2.0, 1e-5
INTERPRETED = ("f32", "f16")  # what the interpreter computes right
# Primes, and one under and one over what tiles are made of.
ROWS = (7, 15, 17, 37, 63, 65)
WIDTHS: dict[str, tuple[tuple[int, ...], ...]] = {
    "attention": ((1, 16), (2, 16), (1, 40), (3, 24)),  # (H, D)
    "layer_norm": ((1,), (13,), (63,), (65,), (127,), (129,), (768,)),
    "ffn": ((8,), (16,), (24,), (40,)),
    "rms_norm": ((1,), (13,), (63,), (65,), (127,), (129,), (768,)),
    "embedding": ((1,), (13,), (63,), (65,), (129,)),
    "rotary": ((1, 16), (2, 24), (3, 40), (2, 64)),  # (H, D)
    "quantized_linear": ((13,), (24,), (32,), (96,)),
    "cross_entropy": ((1,), (2,), (63,), (65,), (257,)),  # V
    "linear_cross_entropy": ((8,), (16,), (24,), (40,)),
}
HEADS = ("attention", "rotary")
VOCABULARY = 67  # of the ops that have one beside a width
OPS = tuple(WIDTHS)


@dataclass(frozen=True)
class Case:
    """An op at a shape: (B, T, H, D) where it has heads, (B, T, C) for the others."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    seed: int = 0

    def __str__(self) -> str:
        letters = "BTHD" if self.op in HEADS else "BTC"
        return " ".join(f"{name}={n}" for name, n in zip(letters, self.shape, strict=True))


def ops(
    names: Sequence[str] = OPS,
    dtypes: Sequence[str] = ("f32", "f16", "bf16"),
    shapes: int = 4,
    seed: int = 0,
    timeout: float | None = None,
) -> tuple[list[Number], list[Checked]]:
    """Compare fastgpt's ops with float64 at shapes drawn with a seed.

    Args:
        names: of OPS.
        shapes: how many are drawn for each op.
        timeout: seconds that one op may take at one shape.

    Returns:
        A number for every output and gradient, and for each case "clean", "found" or why it did
        not run.

    Raises:
        ValueError: a name is none of OPS.
    """
    if unknown := [name for name in names if name not in OPS]:
        raise ValueError(f"numbers: the ops are {', '.join(OPS)}; got {', '.join(unknown)}")
    rng = random.Random(seed)
    drawn = {name: _drawn(name, shapes, rng) for name in names}
    cases = [Case(n, d, shape, seed) for n in names for d in dtypes for shape in drawn[n]]
    return _collect(
        [(case, case.op, case.dtype in INTERPRETED, str(case)) for case in cases],
        "fastgpt.lab.numbers:measure_op", timeout,
    )  # fmt: skip


def launches(
    given: Sequence[Launch], timeout: float | None = None
) -> tuple[list[Number], list[Checked]]:
    """Compare launches that have a reference with it, and with it in float64.

    Args:
        given: launches; those without a reference are left out.
        timeout: seconds that one launch may take.

    Returns:
        A number for every tensor that the reference gives, and for each launch "clean", "found"
        or why it did not run.
    """
    items = []
    for launch in given:
        if launch.reference is not None:
            dtypes = {arg.dtype for arg in launch.tensors().values()}
            narrow = any(d == "bf16" or d.startswith("f8") for d in dtypes)
            interpreted = not narrow and not semantics.available()
            items.append((launch, launch.name, interpreted, size(launch)))
    return _collect(items, "fastgpt.lab.numbers:measure_launch", timeout)


def _collect(
    items: Sequence[tuple[Any, str, bool, str]], function: str, timeout: float | None
) -> tuple[list[Number], list[Checked]]:
    """Run (item, name, whether interpreted, size) in the process that each needs, in order."""
    results: dict[int, Any] = {}
    for interpreted in (True, False):
        mine = [i for i, item in enumerate(items) if item[2] is interpreted]
        if not interpreted and not semantics.available():
            results |= {i: child.Failure(semantics.MISSING) for i in mine}
            continue
        given = [items[i][0] for i in mine]
        made = child.apply(function, given, interpret=interpreted, timeout=timeout)
        results |= dict(zip(mine, made, strict=True))
    numbers: list[Number] = []
    checked = []
    for i, (_, name, _, at) in enumerate(items):
        if isinstance(results[i], child.Failure):
            outcome = f"not run: {str(results[i]).removeprefix('not run: ')}"
        else:
            numbers += results[i]
            outcome = "clean" if all(n.agrees for n in results[i]) else "found"
        checked.append(Checked(name, "numbers", outcome, at))
    return numbers, checked


def errors(kernel: Tensor, pytorch: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """The kernel's error, PyTorch's in the kernel's dtype, and the error that the law allows."""
    off, theirs = (_error(t, truth) for t in (kernel, pytorch.to(kernel.dtype)))
    return off, theirs, FACTOR * theirs + ATOL


def _error(got: Tensor, truth: Tensor) -> float:
    """The largest difference; NaN where only one of them is, none where both are or agree."""
    got, truth = got.double(), truth.double()
    same = (got == truth) | (got.isnan() & truth.isnan())
    return float(torch.where(same, 0.0, (got - truth).abs()).max()) if got.numel() else 0.0


def _drawn(op: str, shapes: int, rng: random.Random) -> list[tuple[int, ...]]:
    """So many shapes of an op, the first of a single row, none of the others twice."""
    widths: Sequence[tuple[int, ...]] = WIDTHS[op]
    rows = [1, *rng.sample(ROWS, min(shapes, len(ROWS)))]
    wide = rng.sample(widths, len(widths))
    return [(rng.choice((1, 2)), rows[i % len(rows)], *wide[i % len(wide)]) for i in range(shapes)]


Op = Callable[..., Tensor | tuple[Tensor, ...]]


def _problem(case: Case, device: torch.device) -> tuple[Op, tuple[str, ...], dict[str, Tensor]]:
    """The op, the names of its outputs, and its inputs in float64."""
    rng = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = torch.randn(shape, generator=rng, dtype=torch.float64)
        return (mean + scale * drawn).to(device)

    shape, C = case.shape, case.shape[-1]
    if case.op == "attention":
        return fused.attention, ("o",), {name: draw(*shape) for name in "qkv"}
    if case.op in ("layer_norm", "rms_norm"):
        bias = {"bias": draw(C, scale=0.1)} if case.op == "layer_norm" else {}
        return getattr(fused, case.op), ("y", "h"), {
            "x": draw(*shape), "residual": draw(*shape),
            "weight": draw(C, scale=0.1, mean=1.0), **bias,
        }  # fmt: skip
    if case.op == "rotary":
        table = fused.rotary_table(shape[1], C, device=device)
        return partial(_rotary, table), ("q", "k"), {
            "q": draw(*shape), "k": draw(*shape),
            "q_weight": draw(C, scale=0.1, mean=1.0), "k_weight": draw(C, scale=0.1, mean=1.0),
        }  # fmt: skip
    V = C if case.op == "cross_entropy" else VOCABULARY
    ids = torch.randint(V, shape[:2], generator=rng).to(device)
    if case.op == "embedding":
        inputs = {"wte": draw(V, C), "wpe": draw(shape[1], C)}
        return partial(fused.embedding, ids), ("h",), inputs
    if case.op == "cross_entropy":
        return partial(fused.cross_entropy, target=ids), ("loss",), {"logits": draw(*shape)}
    if case.op == "quantized_linear":
        quantize = quantized.quantize_int8 if C % quantized.GROUP else quantized.quantize_int4
        weight, scale = (t.to(device) for t in quantize(draw(V, C, scale=C**-0.5).cpu()))
        linear = partial(fused.quantized_linear, weight=weight, scale=scale)
        return linear, ("y",), {"x": draw(*shape), "bias": draw(V, scale=0.1)}
    if case.op == "linear_cross_entropy":
        inputs = {"x": draw(*shape), "weight": draw(V, C, scale=C**-0.5)}
        return partial(fused.linear_cross_entropy, target=ids), ("loss",), inputs
    return fused.ffn, ("y",), {
        "x": draw(*shape),
        "w1": draw(4 * C, C, scale=C**-0.5), "b1": draw(4 * C, scale=0.1),
        "w2": draw(C, 4 * C, scale=(4 * C) ** -0.5), "b2": draw(C, scale=0.1),
    }  # fmt: skip


def _rotary(
    table: tuple[Tensor, Tensor], q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor]:
    return fused.rotary(q, k, *table, q_weight=q_weight, k_weight=k_weight)


def _run(
    op: Op, outputs: Sequence[str], inputs: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients; the gradients that come in are numbers that dtype can hold."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    made = op(**leaves)
    values = [made] if isinstance(made, Tensor) else list(made)
    rng = torch.Generator().manual_seed(1)
    grads = [torch.randn(v.shape, generator=rng).to(dtype).to(v) for v in values]
    got = torch.autograd.grad(values, list(leaves.values()), grads)
    named = dict(zip(outputs, (v.detach() for v in values), strict=True))
    return named | {f"d{name}": g for name, g in zip(leaves, got, strict=True)}


def compare(case: Case, device: torch.device, where: str) -> list[Number]:
    """A number for each output and gradient of an op, run by its kernel.

    Args:
        where: what runs it, "compiled" or "interpreter", for the path.

    Raises:
        ValueError: the kernel cannot take the case.
    """
    op, outputs, exact = _problem(case, device)
    dtype = DTYPES[case.dtype]
    inputs = {name: t.to(dtype) for name, t in exact.items()}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, for both
    try:
        with backend.use("reference"):
            gold = _run(op, outputs, {name: t.double() for name, t in inputs.items()}, dtype)
            plain = _run(op, outputs, inputs, dtype)
        with backend.use("triton"):
            kernel = _run(op, outputs, inputs, dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    (choice,) = (c for c in backend.explain() if c.op == case.op)
    return [
        Number(
            case.op, case.dtype, str(case), what, *errors(kernel[what], plain[what], truth),
            f"{choice.path}, {where}",
        )
        for what, truth in gold.items()
    ]  # fmt: skip


def measure_op(case: Case) -> list[Number]:
    """`compare` in a process that interprets, or that does nothing but run ttsem."""
    if backend.INTERPRET:
        interpret.mend()
        return compare(case, torch.device("cpu"), "interpreter")
    from ttsem import sanitize

    semantics.teach()
    with sanitize.session(semantics.CHIP, races="off"):
        return compare(case, torch.device("cuda"), "ttsem")


def measure_launch(launch: Launch) -> list[Number]:
    """A number for each tensor that the launch's reference gives, in a process as `measure_op`'s.

    Raises:
        ValueError: the reference does not give what the kernel writes, or the kernel failed.
    """
    if backend.INTERPRET:
        args, after = launch.arguments()
        with metered(after.values()):  # which ends a kernel that leaves its tensors
            interpret.run(launch, args)
    else:
        ran = semantics.run(launch)
        if ran.stop is not None:
            raise ValueError(": ".join(ran.stop[1:]))
        after = ran.tensors
    _, before = launch.arguments()
    written = [name for name, t in after.items() if not _same(t, before[name])]
    plain, truth = (_referred(launch, written, double) for double in (False, True))
    numbers = []
    for name, exact in truth.items():
        got = after[name]
        if exact.shape != got.shape:
            raise ValueError(
                f"reference of {launch.name}: {name} must be {tuple(got.shape)};"
                f" got {tuple(exact.shape)}"
            )
        path = "interpreter" if backend.INTERPRET else "ttsem"
        numbers.append(
            Number(
                launch.name, SHORT[got.dtype], size(launch), name,
                *errors(got, plain[name], exact), path,
            )
        )  # fmt: skip
    return numbers


def _same(a: Tensor, b: Tensor) -> bool:
    bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*bits)


def _referred(launch: Launch, written: Sequence[str], double: bool) -> Mapping[str, Tensor]:
    """What the reference gives on the launch's inputs, or on them in float64."""
    assert launch.reference is not None
    reference = load(launch.reference)
    _, tensors = launch.arguments()
    given = dict(launch.args) | {
        name: t.double() if double and t.is_floating_point() else t for name, t in tensors.items()
    }
    wanted = list(inspect.signature(reference).parameters)
    if unknown := [name for name in wanted if name not in given]:
        raise ValueError(
            f"reference of {launch.name}: its arguments must be the kernel's; got"
            f" {', '.join(unknown)}"
        )
    made = reference(**{name: given[name] for name in wanted})
    if isinstance(made, Tensor):
        if len(written) != 1:
            raise ValueError(
                f"reference of {launch.name}: a dict of what is written is needed, which is"
                f" {', '.join(written) or 'nothing'}; got one tensor"
            )
        return {written[0]: made}
    if unknown := [name for name in made if name not in tensors]:
        raise ValueError(
            f"reference of {launch.name}: it must give tensors of the kernel's; got"
            f" {', '.join(unknown)}"
        )
    found: Mapping[str, Tensor] = made
    return found
