"""LoRA: the formula, its gradients through every path of a GPT, merging, what is frozen."""

import copy
import math
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgpt
from fastgpt import GPT, GPTConfig, generate, lora
from fastgpt.lora import LoraConfig, LoRALinear
from fastgpt.ops import backend
from fastgpt.train.optimizer import OptimConfig
from tests.conftest import ROOT
from tests.op_cases import registered

GPT2 = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
LLAMA = GPTConfig(16, 31, 2, 4, 32, variant="llama", n_kv_head=2, n_inner=48, qk_norm=True)
CONFIGS = [GPT2, replace(GPT2, bias=False, tied=False, activation="relu"), LLAMA]
NAMES = ["gpt2", "no bias", "llama"]
TARGETS: list[tuple[str, ...]] = [(), ("c_attn",), ("c_proj", "h.1.mlp.c_fc", "mlp.up_proj")]


def made(config: GPTConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """A model none of whose weights is at its initial value."""
    torch.manual_seed(1)
    model = GPT(config)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.to(dtype)


def adapted(config: GPTConfig, lora_config: LoraConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """The same with LoRA whose B is not at its initial value."""
    wanted = tuple(t for t in lora_config.targets if t.endswith("up_proj") is config.llama
                   or t in ("c_attn", "c_proj"))  # fmt: skip
    model = lora.add(made(config, dtype), replace(lora_config, targets=wanted))
    for _, layer in lora.layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def ids(T: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    idx = torch.randint(31, (2, T + 1))
    return idx[:, :-1], idx[:, 1:]


def gradients_by_the_chain_rule(
    model: GPT, config: GPTConfig, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Of A and B, from the gradient by W + s B A of a plain model with these weights."""
    plain = GPT(config).to(dtype)
    plain.load_state_dict(lora.merged_weights(copy.deepcopy(model).double()))
    plain(*ids()).backward()
    grads = {}
    for name, layer in lora.layers(model):
        dw = plain.get_parameter(f"{name}.weight").grad
        assert dw is not None
        A, B, dw = layer.lora_A.double(), layer.lora_B.double(), dw.double()
        grads[f"{name}.lora_A"] = (layer.scale * B.T @ dw).detach()
        grads[f"{name}.lora_B"] = (layer.scale * dw @ A.T).detach()
    return grads


def assert_gradients(
    model: GPT, config: GPTConfig, rtol: float, same: dict[str, Tensor] | None = None
) -> None:
    """They err at most rtol, and twice what the plain model's err at the same precision."""
    want = gradients_by_the_chain_rule(model, config)
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name, truth in want.items():
        err = (got[name].double() - truth).norm() / truth.norm()
        theirs = 0.0 if same is None else (same[name] - truth).norm() / truth.norm()
        assert err < 2.0 * theirs + rtol, f"{name}: off by {err:.1e} of its norm"


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_its_formula(bias: bool) -> None:
    base = nn.Linear(6, 10, bias).double()
    layer = LoRALinear(base, rank=3, alpha=5.0)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.lora_B)
    change = 5.0 / 3 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), base(x) + x @ change.T)
    torch.testing.assert_close(layer.merged(), base.weight + change)
    assert torch.autograd.gradcheck(
        lambda x, A, B: torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,)),
        (x.requires_grad_(), layer.lora_A.detach().requires_grad_(),
         layer.lora_B.detach().requires_grad_()),
    )  # fmt: skip


@pytest.mark.parametrize("recompute", [1, 2])
@pytest.mark.parametrize("ops", [nullcontext, registered], ids=["plain", "kernels' way"])
@pytest.mark.parametrize("targets", TARGETS, ids=["all", "c_attn", "some"])
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_it_is_the_merged_model_and_so_are_its_gradients(
    config: GPTConfig, targets: tuple[str, ...], ops: Any, recompute: int
) -> None:
    """On the kernels' way a block hands its branch on without the bias, where a layer lends it."""
    config = replace(config, recompute=recompute)
    model = adapted(config, LoraConfig(3, 5.0, targets))
    merged = lora.merge(copy.deepcopy(model))
    x, y = ids()
    with ops():
        torch.testing.assert_close(model(x), merged(x), atol=2e-5, rtol=1e-5)
        model(x, y).backward()
    assert_gradients(model, config, 1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_it_is_right_under_autocast(config: GPTConfig) -> None:
    model = adapted(config, LoraConfig(4, 8.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*ids())
        same = gradients_by_the_chain_rule(model, config, torch.float32)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert_gradients(model, config, 0.02, same)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_it_compiles_to_one_graph(config: GPTConfig) -> None:
    model = adapted(config, LoraConfig(4, 8.0))
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(*ids())
    torch.testing.assert_close(loss, model(*ids()))
    loss.backward()
    assert_gradients(model, config, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("targets", TARGETS, ids=["all", "c_attn", "some"])
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_its_kernels_give_its_gradients(
    config: GPTConfig, targets: tuple[str, ...], device: str
) -> None:
    model = adapted(config, LoraConfig(3, 5.0, targets)).to(device)
    x, y = (t.to(device) for t in ids())
    with fastgpt.use("triton"):
        model(x, y).backward()
    assert_gradients(model.cpu(), config, 1e-4 if device == "cpu" else 5e-3)


def test_it_begins_at_the_model_as_it_was() -> None:
    for config in CONFIGS:
        base = made(config)
        model = lora.add(copy.deepcopy(base), LoraConfig(2))
        assert torch.equal(model(ids()[0]), base(ids()[0]))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_changes_its_matrices_alone(name: str) -> None:
    model = lora.add(made(GPT2), LoraConfig(2))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = OptimConfig(name, lr=1e-2).build(model)
    first = 0.0
    for _ in range(30):
        loss = model(*ids())
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.8 * first
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) is not p.requires_grad, n
        assert p.requires_grad is n.endswith(("lora_A", "lora_B")), n


def test_dropout_is_of_its_input_in_training_only() -> None:
    layer = LoRALinear(nn.Linear(64, 8), 4, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 64)
    base = F.linear(x, layer.weight, layer.bias)
    many = torch.stack([layer(x) - base for _ in range(4000)])
    layer.eval()
    want = layer(x) - base
    assert many.std(0).min() > 0.1 and torch.equal(layer(x) - base, want)
    assert ((many.mean(0) - want).abs() < 6 * many.std(0) / math.sqrt(4000)).all()


def test_its_matrices_are_float32_beside_weights_of_16_bits() -> None:
    model = adapted(GPT2, LoraConfig(4), torch.bfloat16)
    x, y = ids()
    assert model(x).dtype == torch.bfloat16
    model(x, y).backward()
    layer = dict(lora.layers(model))["h.0.mlp.c_fc"]
    assert layer.lora_A.grad is not None
    assert layer.lora_A.dtype == layer.lora_A.grad.dtype == torch.float32
    assert layer.merged().dtype == torch.bfloat16
    exact = layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.equal(layer.merged(), exact.to(torch.bfloat16))


def test_merging_leaves_a_plain_model() -> None:
    base = made(GPT2)
    model = lora.merge(adapted(GPT2, LoraConfig(2)))
    assert model.state_dict().keys() == base.state_dict().keys()
    assert {type(m) for m in model.modules()} == {type(m) for m in base.modules()}
    assert all(p.requires_grad for p in model.parameters())


def test_a_feed_forward_is_one_op_unless_it_is_adapted() -> None:
    def asked(model: GPT) -> bool:
        with mock.patch.object(backend, "kernel_chosen", return_value=False) as chosen:
            model(ids()[0])
        return "ffn" in {call.args[0] for call in chosen.call_args_list}

    model = adapted(GPT2, LoraConfig(2))
    assert not asked(model)
    assert asked(lora.merge(model))
    assert asked(adapted(GPT2, LoraConfig(2, targets=("c_attn",))))


def test_it_generates_what_the_merged_model_does() -> None:
    model = adapted(LLAMA, LoraConfig(2)).eval()
    merged = lora.merge(copy.deepcopy(model))
    prompt = ids(5)[0]
    got, want = (generate(m, prompt, 8, temperature=0.0) for m in (model, merged))
    assert torch.equal(got, want)


def test_a_saved_model_is_the_merged_one(tmp_path: Any) -> None:
    config = replace(GPT2, bias=True)
    model = adapted(config, LoraConfig(2)).eval()
    model.save_pretrained(tmp_path)
    saved = GPT.from_pretrained(tmp_path)
    merged = lora.merge(copy.deepcopy(model))
    for name, t in merged.state_dict().items():
        assert torch.equal(saved.state_dict()[name], t), name
    assert sum(1 for _ in lora.layers(model)) == 8  # and it itself goes on


def test_rejects_what_it_cannot_adapt() -> None:
    with pytest.raises(ValueError, match=r"^lora: rank must be at least 1; got 0$"):
        lora.add(made(GPT2), LoraConfig())
    with pytest.raises(
        ValueError,
        match=r"^lora: targets must be linear layers of the blocks, as attn.c_attn, attn.c_proj,"
        r" mlp.c_fc, mlp.c_proj; got 'q_proj'$",
    ):
        lora.add(made(GPT2), LoraConfig(2, targets=("c_attn", "q_proj")))
    with pytest.raises(ValueError, match=r"^lora: the model must have no LoRA; it has"):
        lora.add(lora.add(made(GPT2), LoraConfig(2)), LoraConfig(2))
    for change, message in (
        ({"rank": -1}, "rank must not be negative; got -1"),
        ({"alpha": 0.0}, "alpha must be positive; got 0.0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\); got 1.0"),
    ):
        with pytest.raises(ValueError, match=f"^lora: {message}$"):
            LoraConfig(**change)


SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from fastgpt import lora
from fastgpt.lora import LoraConfig
from fastgpt.train.optimizer import OptimConfig
from tests.test_lora import CONFIGS, adapted, ids

def train(model, sharded):
    optimizer = OptimConfig(lr=1e-2).build(model, clip=False)
    rank = dist.get_rank()
    x, y = ids()
    rows = slice(rank, rank + 1) if sharded else slice(None)
    for _ in range(3):
        model(x[rows], y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: getattr(p, "full_tensor", lambda: p)().detach() for n, p in model.named_parameters()}

dist.init_process_group("gloo")
for config in CONFIGS:
    for dtype in (torch.float32, torch.bfloat16):
        want = train(adapted(config, LoraConfig(3, 5.0), dtype), False)
        model = adapted(config, LoraConfig(3, 5.0), dtype)
        for block in model.h:
            fully_shard(block)
        fully_shard(model)
        got = train(model, True)
        # Of 16 bits, the activations of one row are rounded as those of two are.
        atol = 2e-5 if dtype == torch.float32 else 1e-2
        assert got.keys() == want.keys()
        for name in want:
            assert torch.allclose(got[name], want[name], atol=atol), (config, dtype, name)
            assert got[name].dtype == want[name].dtype
if dist.get_rank() == 0:
    print("equal")
dist.destroy_process_group()
"""


def test_sharded_over_two_ranks_it_trains_as_on_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    got = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", SHARDED],
        capture_output=True, text=True, cwd=ROOT, timeout=280,
    )  # fmt: skip
    assert got.returncode == 0, got.stderr[-3000:]
    assert "equal" in got.stdout
