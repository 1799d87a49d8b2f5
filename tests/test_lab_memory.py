"""What ops and models keep for backward, and what a call costs before it launches."""

from typing import Any

import pytest
import torch
from torch import nn

from fastgpt.lab import cases, memory
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA
from tests.lab_specs import copy_spec

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="compiles on CPU tensors, without a driver"),
]


def test_saved_bytes_are_those_of_autograd() -> None:
    x = torch.zeros(64, 32, requires_grad=True)
    w = torch.zeros(16, 32, requires_grad=True)

    def call() -> torch.Tensor:
        return torch.nn.functional.linear(x.tanh(), w).exp()

    # tanh keeps its output, which linear keeps too: once; exp keeps its own. w is a parameter.
    assert memory.saved_bytes(call, [w]) == 4 * (64 * 32 + 64 * 16)
    assert memory.saved_bytes(call) == 4 * (64 * 32 + 64 * 16 + 16 * 32)
    with torch.no_grad():
        assert memory.saved_bytes(call) == 0


def test_fake_tensors_weigh_what_real_ones_do() -> None:
    def build() -> tuple[nn.Module, Any]:
        model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48), nn.LayerNorm(48))
        x = torch.zeros(8, 16, 48, requires_grad=True)
        return model, lambda: model(x)

    model, call = build()
    assert memory.of_model(build) == memory.saved_bytes(call, model.parameters())


def test_the_kernels_keep_what_they_promise() -> None:
    """Layer norm: h, mean and rstd. Attention: q, k, v, o, lse. ffn: x and pre-activation."""
    M, N = 512, 768
    kept = {
        name: {row.provider: row.bytes for row in memory.of_op(*cases.parse(said))}
        for name, said in {
            "layer_norm": f"layer_norm:M={M},N={N}",
            "attention": "attention:B=2,T=128,H=4,D=64",
            "ffn": f"ffn:M={M},C={N},F={4 * N}",
        }.items()
    }
    assert kept["layer_norm"]["fastgpt"] == 2 * M * N + 2 * 4 * M
    assert kept["attention"]["fastgpt"] == 4 * 2 * (2 * 128 * 4 * 64) + 4 * 2 * 4 * 128
    assert kept["ffn"]["fastgpt"] == 2 * (M * N + M * 4 * N)
    for name in ("layer_norm", "ffn"):
        assert kept[name]["fastgpt"] < kept[name]["PyTorch"]


def test_what_rotary_embedding_keeps_is_its_table_and_with_a_norm_its_input() -> None:
    table, packed = 2 * 4 * 128 * 32, 2 * 128 * 8 * 64
    for norm, want in (("none", table), ("rms", table + packed)):
        _, sizes = cases.parse(f"rotary:B=1,T=128,H=4,Hkv=2,D=64,norm={norm}")
        kept = {row.provider: row.bytes for row in memory.of_op("rotary", sizes)}
        assert kept["fastgpt"] == want <= kept["PyTorch"]


def test_host_cost_counts_the_launches_of_an_op() -> None:
    from fastgpt.lab import host

    launches = {row.what: row.launches for name in cases.OPS for row in host.of_op(name)}
    assert launches == {
        "layer_norm, forward": 1, "layer_norm, forward and backward": 3,
        "rms_norm, forward": 1, "rms_norm, forward and backward": 3,
        "embedding, forward": 1, "embedding, forward and backward": 3,
        "attention, forward": 1, "attention, forward and backward": 3,
        "attention_decode, forward": 2,
        "rotary, forward": 1, "rotary, forward and backward": 3,
        "ffn, forward": 1, "ffn, forward and backward": 2,
        "quantized_linear, forward": 1, "quantized_linear, forward and backward": 2,
        "cross_entropy, forward": 1, "cross_entropy, forward and backward": 2,
        "linear_cross_entropy, forward": 1, "linear_cross_entropy, forward and backward": 1,
        "adamw, forward": 2,
    }  # fmt: skip
    (launch,) = copy_spec().launches()
    cost = host.of_launch(launch)
    assert cost.launches == 1 and 0 < cost.microseconds < 1e5
