"""The choice of path: use, explain, and what is said when a kernel cannot run."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt.ops import attention, backend, layer_norm
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA, SANITIZED

CPU_ONLY = pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="about a machine that runs no kernels")


@CPU_ONLY
def test_auto_takes_the_reference_and_says_why() -> None:
    q = torch.randn(1, 3, 1, 8)
    (choice,) = fastgpt.explain(attention, q, q, q)
    assert (choice.op, choice.path) == ("attention", "reference")
    assert choice.why == "tensors are on cpu; kernels need CUDA, or TRITON_INTERPRET=1"
    assert choice in fastgpt.explain()


@CPU_ONLY
def test_a_forced_kernel_raises_and_says_why() -> None:
    q = torch.randn(1, 3, 1, 8)
    rule = "attention: the triton path is forced, but tensors are on cpu"
    with fastgpt.use("triton"), pytest.raises(ValueError, match=rule):
        attention(q, q, q)


def test_explain_hears_all_ops_of_a_call_in_order() -> None:
    def call() -> None:
        x = torch.randn(2, 8)
        layer_norm(x, x[0])
        attention(*[torch.randn(1, 2, 1, 8)] * 3)

    with fastgpt.use("reference"):
        heard = fastgpt.explain(call)
    assert [(c.op, c.why) for c in heard] == [
        ("layer_norm", 'use("reference")'),
        ("attention", 'use("reference")'),
    ]


def test_use_is_undone_by_an_error_and_nests() -> None:
    before = backend._path
    with pytest.raises(KeyError), fastgpt.use("reference"):
        with fastgpt.use("auto"):
            assert backend._path == "auto"
        assert backend._path == "reference"
        raise KeyError
    assert backend._path == before


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of auto, triton, reference; got 'cuda'"):
        with fastgpt.use("cuda"):
            pass


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTGPT", "TRITON_INT"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | env, capture_output=True, text=True
    )


def test_the_environment_sets_the_default() -> None:
    code = "from fastgpt.ops import backend; print(backend._path)"
    assert run(code, FASTGPT_BACKEND="reference").stdout.strip() == "reference"
    bad = run(code, FASTGPT_BACKEND="fast")
    assert "FASTGPT_BACKEND: the path must be one of" in bad.stderr and bad.returncode != 0


@pytest.mark.gpu
def test_auto_takes_the_kernel_where_it_can(device: str) -> None:
    q = torch.randn(1, 3, 1, 8, device=device)
    (choice,) = fastgpt.explain(attention, q, q, q)
    assert choice.path == "triton"
    assert choice.why == ("a CUDA tensor" if device == "cuda" else "Triton's interpreter")
    (choice,) = fastgpt.explain(attention, q, q, q, softmax_scale=-1.0)
    assert choice.path == "reference" and "positive softmax_scale" in choice.why


@pytest.mark.gpu
def test_transforms_of_torch_func_take_the_reference(device: str) -> None:
    x, w = torch.randn(3, 2, 8, device=device), torch.randn(8, device=device)
    layer_norm(x, w)

    def norm(row: Tensor) -> Tensor:
        return layer_norm(row, w)

    assert torch.allclose(torch.func.vmap(norm)(x), norm(x), atol=1e-5)
    (choice,) = fastgpt.explain(torch.func.vmap(norm), x)
    assert choice.path == "reference" and "torch.func" in choice.why


def test_the_kernel_path_compiles_to_one_graph() -> None:
    """The public functions, compiled where they choose their kernels: without a graph break."""
    code = """
import torch, fastgpt
from fastgpt import ops

def block(x, w, b, w1, w2):
    q, k, v = (x * i for i in (1, 2, 3))
    q, k, v = (t.view(1, 5, 2, 8) for t in (q, k, v))
    y, h = ops.layer_norm(ops.attention(q, k, v).flatten(2), w, b, residual=x)
    return ops.ffn(y, w1, None, w2, None) + h

args = [torch.randn(s, requires_grad=True) for s in ((1, 5, 16), (16,), (16,), (32, 16), (16, 32))]
compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
with fastgpt.use("triton"):
    got, want = compiled(*args), block(*args)
    for g, w in zip(torch.autograd.grad(got.sum(), args), torch.autograd.grad(want.sum(), args)):
        torch.testing.assert_close(g, w)
torch.testing.assert_close(got, want)
print("equal", {c.path for c in fastgpt.explain()})
"""
    got = run(code, TRITON_INTERPRET="1")
    assert got.stdout.strip() == "equal {'triton'}", got.stderr


@pytest.mark.gpu
def test_the_launch_is_guarded_by_the_tensors_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cuda":
        x = torch.randn(2, 8)
        with fastgpt.use("triton"):
            layer_norm(x, x[0])
        return
    guarded = []

    class Watched(torch.cuda.device):
        def __init__(self, index: torch.device) -> None:
            guarded.append(index)
            super().__init__(index)

    x = torch.randn(2, 8, device=f"cuda:{torch.cuda.device_count() - 1}")
    layer_norm(x, x[0])
    monkeypatch.setattr(torch.cuda, "device", Watched)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -2)  # another than any tensor's
    layer_norm(x, x[0])
    assert len(guarded) == 1
    assert SANITIZED or guarded == [x.device]  # there the device is only the program's belief
