"""How far kernel and reference lie from the exact result, for each op, on the machine at hand.

    python -m fastgpt.lab.agreement

runs the kernels on the GPU, or without one in Triton's interpreter, on small odd shapes. An error
is the largest difference from the same formula in float64, over the outputs or all gradients.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastgpt.lab import child, interpret, numbers
from fastgpt.lab.launch import DTYPES
from fastgpt.lab.result import Number
from fastgpt.ops import backend


@dataclass(frozen=True)
class Agreement:
    """One op in one dtype and direction.

    Attributes:
        op, dtype, direction: what was compared; direction is "forward" or "backward".
        path: what ran, from `fastgpt.explain`.
        kernel, pytorch: largest error of the kernel and of plain PyTorch against float64.
    """

    op: str
    dtype: str
    direction: str
    path: str
    kernel: float
    pytorch: float


def _cases(cuda: bool) -> list[numbers.Case]:
    """Every op; on a GPU shapes of a model's size, and bfloat16 too."""
    B, T, H, D, C = (4, 517, 12, 64, 768) if cuda else (1, 37, 2, 16, 48)
    dtypes = ("f32", "f16", *(("bf16",) if cuda else ()))
    return [
        numbers.Case(op, d, (B, T, H, D) if op in numbers.HEADS else (B, T, C))
        for op in numbers.OPS
        for d in dtypes
    ]


def _rows(found: Iterable[Number]) -> list[Agreement]:
    """The two directions of one op and dtype."""
    rows = []
    for direction in ("forward", "backward"):
        mine = [n for n in found if n.what.startswith("d") == (direction == "backward")]
        dtype = str(DTYPES[mine[0].dtype]).removeprefix("torch.")
        errors = max(n.kernel for n in mine), max(n.pytorch for n in mine)
        rows.append(Agreement(mine[0].op, dtype, direction, mine[0].path, *errors))
    return rows


def compare(cuda: bool) -> list[Agreement]:
    """Every op's kernel against plain PyTorch and float64, forward and backward.

    Args:
        cuda: run on CUDA; on the CPU TRITON_INTERPRET=1 must be set.

    Raises:
        ValueError: no kernel can run here.
    """
    if not cuda:
        interpret.mend()
    device, where = torch.device("cuda" if cuda else "cpu"), "compiled" if cuda else "interpreter"
    return [r for case in _cases(cuda) for r in _rows(numbers.compare(case, device, where))]


def table(rows: list[Agreement]) -> str:
    """The comparison as text."""
    head = f"{'op':<21}{'dtype':<10}{'direction':<11}{'path':<22}{'kernel':>10}{'PyTorch':>10}"
    lines = [
        f"{r.op:<21}{r.dtype:<10}{r.direction:<11}{r.path:<22}{r.kernel:>10.1e}{r.pytorch:>10.1e}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def measure(timeout: float | None = None) -> str:
    """The table for this machine; without a GPU made by a process of its own that interprets.

    Args:
        timeout: seconds after which the other process is given up.

    Raises:
        RuntimeError: no kernel could be run; the message says why.
    """
    cuda = torch.cuda.is_available()
    if cuda or backend.INTERPRET:
        return table(compare(cuda))
    (made,) = child.apply("fastgpt.lab.agreement:compare", [cuda], interpret=True, timeout=timeout)
    if isinstance(made, child.Failure):
        raise RuntimeError(str(made))
    return table(made)


if __name__ == "__main__":
    print(measure())
