"""How far kernel and reference lie from the exact result, for each op, on the machine at hand.

    python -m fastgpt.lab.agreement

runs the kernels on the GPU, or without one in Triton's interpreter, on small odd shapes. An error
is the largest difference from the same formula in float64, over the output or all gradients.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import backend

Op = Callable[..., Tensor | tuple[Tensor, ...]]


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


def _cases(device: torch.device, big: bool) -> dict[str, tuple[Op, list[Tensor]]]:
    """Every op with float64 inputs; on a GPU shapes of a model's size."""
    B, T, H, D, C = (4, 517, 12, 64, 768) if big else (1, 37, 2, 16, 48)
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=rng, dtype=torch.float64)).to(device)

    return {
        "attention": (ops.attention, [draw(B, T, H, D) for _ in range(3)]),
        "layer_norm": (
            lambda x, h, w, b: ops.layer_norm(x, w, b, residual=h),
            [draw(B, T, C), draw(B, T, C), 1.0 + draw(C, scale=0.1), draw(C, scale=0.1)],
        ),
        "ffn": (
            ops.ffn,
            [
                draw(B, T, C),
                draw(4 * C, C, scale=C**-0.5),
                draw(4 * C, scale=0.1),
                draw(C, 4 * C, scale=(4 * C) ** -0.5),
                draw(C, scale=0.1),
            ],
        ),
    }


def _run(op: Op, inputs: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients; the gradients that come in are numbers that dtype can hold."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = op(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    rng = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=rng).to(dtype).to(o) for o in outs]
    made = torch.autograd.grad(outs, leaves, grads)
    return [o.detach() for o in outs], list(made)


def _error(got: list[Tensor], gold: list[Tensor]) -> float:
    return max(float((a.double() - b).abs().max()) for a, b in zip(got, gold, strict=True))


def compare(device: torch.device | None = None) -> list[Agreement]:
    """Compare every op's kernel with plain PyTorch and float64, forward and backward.

    Args:
        device: CUDA if there is one, by default; on the CPU TRITON_INTERPRET=1 must be set.

    Raises:
        ValueError: no kernel can run on the device.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    dtypes = [torch.float32, torch.float16, *([torch.bfloat16] if cuda else [])]
    rows = []
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, for both
    try:
        for name, (op, exact) in _cases(device, big=cuda).items():
            for dtype in dtypes:
                inputs = [t.to(dtype) for t in exact]
                with backend.use("reference"):
                    gold = _run(op, [t.double() for t in inputs], dtype)
                    plain = _run(op, inputs, dtype)
                with backend.use("triton"):
                    kernel = _run(op, inputs, dtype)
                (choice,) = (c for c in backend.explain() if c.op == name)
                where = "compiled" if cuda else "interpreter"
                path = f"{choice.path}, {where}"
                for i, direction in enumerate(("forward", "backward")):
                    errors = _error(kernel[i], gold[i]), _error(plain[i], gold[i])
                    short = str(dtype).removeprefix("torch.")
                    rows.append(Agreement(name, short, direction, path, *errors))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return rows


def table(rows: list[Agreement]) -> str:
    """The comparison as text."""
    head = f"{'op':<11}{'dtype':<10}{'direction':<11}{'path':<22}{'kernel':>10}{'PyTorch':>10}"
    lines = [
        f"{r.op:<11}{r.dtype:<10}{r.direction:<11}{r.path:<22}{r.kernel:>10.1e}{r.pytorch:>10.1e}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def measure(timeout: float | None = None) -> str:
    """The table for this machine; without a GPU made by a process of its own that interprets.

    TRITON_INTERPRET is read when a kernel is defined, so it cannot be set in a running process.

    Args:
        timeout: seconds after which the other process is given up.

    Raises:
        RuntimeError: no kernel could be run; the message says why.
    """
    if torch.cuda.is_available() or backend.INTERPRET:
        return table(compare())
    command = [sys.executable, "-m", "fastgpt.lab.agreement"]
    environment = dict(os.environ, TRITON_INTERPRET="1", FASTGPT_BACKEND="auto")
    try:
        made = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the interpreter took more than {timeout:.0f} s") from None
    if made.returncode != 0:
        last = made.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(last[0])
    return made.stdout.rstrip("\n")


if __name__ == "__main__":
    if torch.cuda.is_available() or backend.INTERPRET:
        print(table(compare()))
    else:
        print(measure())
