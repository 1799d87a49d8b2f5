"""The layers against torch's own, and against the formulas written out."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig, ops
from fastgpt.layers import (
    MLP,
    Block,
    Branch,
    CausalSelfAttention,
    GatedMLP,
    KVCache,
    LayerNorm,
    RMSNorm,
)
from tests.op_cases import registered


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    rows=st.lists(st.integers(1, 4), max_size=2),
    affine=st.booleans(),
    bias=st.booleans(),
)
def test_layer_norm_is_a_drop_in(
    shape: list[int], rows: list[int], affine: bool, bias: bool
) -> None:
    theirs = nn.LayerNorm(shape, eps=1e-3, elementwise_affine=affine, bias=bias)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = LayerNorm(shape, eps=1e-3, elementwise_affine=affine, bias=bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(*rows, *shape)
    torch.testing.assert_close(ours(x), theirs(x))


def test_layer_norm_without_bias_has_no_bias_parameter() -> None:
    assert [name for name, _ in LayerNorm(8, bias=False).named_parameters()] == ["weight"]


@pytest.mark.parametrize("shape", [(12,), (3, 4)], ids=str)
def test_layer_norm_adds_the_residual(shape: tuple[int, ...]) -> None:
    norm = LayerNorm(shape)
    x, residual = torch.randn(2, 5, *shape), torch.randn(2, 5, *shape)
    y, h = norm(x, residual)
    assert torch.equal(h, residual + x)
    torch.testing.assert_close(y, F.layer_norm(residual + x, shape, norm.weight, norm.bias))


def test_layer_norm_rejects_another_width() -> None:
    with pytest.raises(ValueError, match=r"^LayerNorm: x must end in \(8,\); got x \(2, 7\)$"):
        LayerNorm(8)(torch.randn(2, 7))


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    rows=st.lists(st.integers(1, 4), max_size=2),
    affine=st.booleans(),
    eps=st.sampled_from([None, 1e-3]),
)
def test_rms_norm_is_a_drop_in(
    shape: list[int], rows: list[int], affine: bool, eps: float | None
) -> None:
    theirs = nn.RMSNorm(shape, eps=eps, elementwise_affine=affine)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = RMSNorm(shape, eps=eps, elementwise_affine=affine)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(*rows, *shape) * 1e-3  # small: eps shows
    torch.testing.assert_close(ours(x), theirs(x))
    y, h = ours(x, x)
    torch.testing.assert_close((y, h), (theirs(x + x), x + x))


def test_rms_norm_rejects_another_width() -> None:
    with pytest.raises(ValueError, match=r"^RMSNorm: x must end in \(8,\); got x \(2, 7\)$"):
        RMSNorm(8)(torch.randn(2, 7))


def test_attention_is_the_formula() -> None:
    B, T, H, D = 2, 7, 3, 8
    attn = CausalSelfAttention(H * D, H).double()
    x = torch.randn(B, T, H * D, dtype=torch.float64)
    q, k, v = attn.c_attn(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    s = q @ k.mT / math.sqrt(D)
    w = s.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    torch.testing.assert_close(w.sum(-1), torch.ones(B, H, T, dtype=torch.float64))
    torch.testing.assert_close(attn(x), attn.c_proj((w @ v).transpose(1, 2).reshape(B, T, -1)))


def test_attention_reads_the_packed_projection_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    attention = ops.attention_packed

    def spy(qkv: torch.Tensor, n_head: int, **options: Any) -> torch.Tensor:
        seen.append(qkv)
        return attention(qkv, n_head, **options)

    monkeypatch.setattr(ops, "attention_packed", spy)
    attn = CausalSelfAttention(32, 2)
    attn.c_attn.register_forward_hook(lambda module, args, y: seen.append(y))
    attn(torch.randn(2, 5, 32))
    made, qkv = seen
    assert qkv.shape == (2, 5, 6, 16) and qkv.data_ptr() == made.data_ptr()


def test_attention_rejects_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"^CausalSelfAttention: n_embd must be a multiple"):
        CausalSelfAttention(30, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_the_formula(bias: bool) -> None:
    mlp = MLP(16, bias)
    x = torch.randn(2, 3, 16)
    u = mlp.c_fc(x)
    gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    torch.testing.assert_close(mlp(x), mlp.c_proj(gelu))
    assert (mlp.c_fc.bias is None) is not bias


@pytest.mark.parametrize("bias", [True, False])
def test_gated_mlp_is_the_formula(bias: bool) -> None:
    mlp = GatedMLP(16, 24, bias)
    x = torch.randn(2, 3, 16)
    gate = mlp.gate_proj(x)
    want = mlp.down_proj(gate * torch.sigmoid(gate) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), want)
    names = {f"{name}_proj.weight" for name in ("gate", "up", "down")}
    assert {n for n in mlp.state_dict() if n.endswith("weight")} == names
    assert (mlp.gate_proj.bias is None) is not bias


def test_block_is_the_textbook_block() -> None:
    block = Block(32, 2).double()
    h = torch.randn(2, 5, 32, dtype=torch.float64)
    before = torch.randn(2, 5, 32, dtype=torch.float64)  # a branch that waits to be added
    want = h + before
    want = want + block.attn(block.ln_1(want))
    want = want + block.mlp(block.ln_2(want))
    branch, stream = block(before, h)
    torch.testing.assert_close(stream + branch, want)
    branch, stream = block(None, h + before)
    torch.testing.assert_close(stream + branch, want)


def test_block_drops_out_in_training_only() -> None:
    block = Block(32, 2, dropout=0.5)
    x, h = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        first, second = block(x, h)[1], block(x, h)[1]
        assert not torch.equal(first, second)
        block.eval()
        assert torch.equal(block(x, h)[1], block(x, h)[1])


def test_cache_rejects_more_than_its_room() -> None:
    cache = KVCache(1, 2, 4, 1, 8)
    with pytest.raises(ValueError, match=r"^KVCache: room is for 4 positions a row; got 5 more"):
        cache.begin(5)
    cache.begin(1)
    k = torch.randn(3, 1, 1, 8)
    with pytest.raises(ValueError, match=r"room is for 2 rows; got 3"):
        cache.attend(0, k, k, k)


@pytest.mark.parametrize("recompute", [1, 2])
@pytest.mark.parametrize("name", ["ln_1.weight", "attn.c_attn.weight", "mlp.c_fc.weight", "h"])
def test_block_says_what_was_changed_before_backward(recompute: int, name: str) -> None:
    block = Block(16, 2, recompute=recompute)
    h = torch.randn(2, 3, 16, requires_grad=True) * 1.0
    first, second = block.attn.c_attn.weight, block.mlp.c_fc.weight
    branch, _ = block(None, h)
    with torch.no_grad():
        (h if name == "h" else block.get_parameter(name)).mul_(2.0)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
        torch.autograd.grad(branch.sum(), [first if "mlp" not in name else second, h])


def test_block_makes_no_wrong_weight_gradient_from_a_changed_norm() -> None:
    block = Block(16, 2, recompute=2)
    branch, _ = block(None, torch.randn(2, 3, 16))
    with torch.no_grad():
        block.ln_1.weight.mul_(2.0)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"^recompute: what backward needs was changed in place"):
        torch.autograd.grad(branch.sum(), block.attn.c_attn.weight)


HOOKS = [
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
]  # fmt: skip


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["h.0", "h.1", "h.1.attn", "h.0.mlp", "ln_f"])
def test_a_hook_sees_tensors_and_changes_no_gradient(name: str, kind: str) -> None:
    """On the kernels' way blocks hand a branch on without its bias, but not where one listens."""
    model = GPT(GPTConfig(8, 31, 2, 2, 16))
    x = torch.randint(31, (2, 8))
    seen: list[Any] = []

    def hook(module: nn.Module, *values: Any) -> None:
        for value in values:
            seen.extend(value if isinstance(value, tuple) else [value])

    with registered():
        model(x, x).backward()
        want = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        handle = getattr(model.get_submodule(name), kind)(hook)
        model(x, x).backward()
    assert not any(isinstance(v, Branch) for v in seen)
    assert any(isinstance(v, Tensor) for v in seen)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[n])
    handle.remove()
