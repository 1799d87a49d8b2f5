"""The whole model on its kernels against the whole model on plain PyTorch."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fastgpt
from fastgpt import GPT, GPTConfig, generate
from fastgpt.lab.memory import saved_bytes
from fastgpt.layers import MLP
from tests.conftest import SANITIZED

pytestmark = pytest.mark.gpu
CONFIG = GPTConfig(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
LLAMA = GPTConfig(24, 31, 2, 4, 32, variant="llama", n_kv_head=2, n_inner=48, qk_norm=True)


def step(model: GPT, idx: Tensor, path: str) -> dict[str, Tensor]:
    """The loss and its gradient by every parameter."""
    with fastgpt.use(path):
        loss = model(idx[:, :-1], idx[:, 1:])
        grads = torch.autograd.grad(loss, list(model.parameters()))
    names = [n for n, _ in model.named_parameters()]
    return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, bias=False), LLAMA], ids=["gpt2", "no bias", "llama"]
)
def test_loss_and_gradients_match_by_parameter_name(config: GPTConfig, device: str) -> None:
    model = GPT(config).to(device)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # away from the ones and zeros of the start
    idx = torch.randint(31, (2, 22), device=device)
    got, same = step(model, idx, "triton"), step(model, idx, "reference")
    gold = step(deepcopy(model).double(), idx, "reference")
    for name, truth in gold.items():
        err = (got[name].double() - truth).abs().max().item()
        allowed = 2 * (same[name].double() - truth).abs().max().item() + 1e-6
        assert err <= allowed, f"{name}: off by {err:.2e}, PyTorch allows {allowed:.2e}"


@pytest.mark.parametrize(
    "config, ops, calls",
    [
        (CONFIG, {"embedding", "attention", "layer_norm", "ffn"}, 1 + 2 + 1),
        (LLAMA, {"embedding", "attention", "rms_norm", "ffn", "rotary"}, 1 + 2 + 1 + 1),
    ],
    ids=["gpt2", "llama"],
)
def test_every_op_of_the_model_takes_its_kernel(
    config: GPTConfig, ops: set[str], calls: int, device: str
) -> None:
    model = GPT(config).to(device).eval()
    idx = torch.randint(31, (1, 5), device=device)
    heard = fastgpt.explain(model, idx)
    assert {c.op for c in heard} == ops
    assert {c.path for c in heard} == {"triton"}
    assert len(heard) == 1 + 2 * calls + 1


def test_trains_with_dropout_and_the_same_seed_gives_the_same_bits(device: str) -> None:
    def train() -> list[float]:
        torch.manual_seed(3)
        model = GPT(GPTConfig(16, 31, n_layer=1, n_head=2, n_embd=16, dropout=0.2)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        idx = torch.randint(31, (2, 17), device=device)
        losses = []
        for _ in range(3):
            with fastgpt.use("triton"):
                loss = model(idx[:, :-1], idx[:, 1:])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    first = train()
    assert first == train()
    assert first[-1] < first[0]


def test_a_module_that_is_watched_or_wrapped_gives_its_whole_output(device: str) -> None:
    """Its bias is summed by itself, and by the next norm only where nobody sees the difference."""
    model = GPT(CONFIG).to(device)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    idx = torch.randint(31, (2, 5), device=device)
    with fastgpt.use("triton"):
        want = model(idx)
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        seen.append((module, args[0], y))

    first, second = model.h
    for module in (first.mlp, first.attn.c_proj, second.attn):
        module.register_forward_hook(watch)
    second.mlp.__class__ = type("Sharded", (MLP,), {})  # as FSDP does
    with fastgpt.use("triton"):
        torch.testing.assert_close(model(idx), want, atol=1e-5, rtol=1e-5)
        for module, x, y in seen[:]:
            torch.testing.assert_close(module(x), y)
    assert len(seen) == 6 and all(isinstance(y, Tensor) for _, _, y in seen)


@pytest.mark.skipif(SANITIZED, reason="to autocast the sanitizer's tensors are CPU tensors")
def test_mixed_precision(device: str) -> None:
    """Under autocast branches are of 16 bits, the stream and the parameters' gradients of 32."""
    model = GPT(CONFIG).to(device)
    idx = torch.randint(31, (2, 20), device=device)
    half = torch.bfloat16 if device == "cuda" else torch.float16
    with torch.autocast(device, half), fastgpt.use("triton"):
        loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    want = step(model, idx, "reference")
    assert torch.allclose(loss.detach().float(), want["loss"], atol=2e-2)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.allclose(p.grad, want[name], atol=2e-2), name


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])
def test_generates_the_same_text_as_the_reference(config: GPTConfig, device: str) -> None:
    model = GPT(config).to(device)
    for p in model.parameters():
        p.data *= 3.0  # logits far apart: rounding decides nothing
    idx = torch.randint(31, (2, 4), device=device)
    with fastgpt.use("triton"):
        got = generate(model, idx, 6, temperature=0.0)
    with fastgpt.use("reference"):
        assert torch.equal(got, generate(model, idx, 6, temperature=0.0))


def three_steps(model: GPT, idx: Tensor, path: str) -> list[dict[str, Tensor]]:
    """Loss and gradients by name of three training steps, clipped, by fastgpt's AdamW."""
    optimizer = model.configure_optimizer(lr=1e-3, max_grad_norm=1.0)
    made = []
    for n in range(3):
        with fastgpt.use(path):
            loss = model(idx[n, :, :-1], idx[n, :, 1:])
            loss.backward()
            grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
        optimizer.zero_grad()
        made.append({"loss": loss.detach(), **grads})
    return made


def test_three_training_steps_are_the_references(device: str) -> None:
    """The whole of a GPT-2 step: embedding, blocks, loss head, clipping and AdamW."""
    model = GPT(replace(CONFIG, n_layer=1)).to(device)
    idx = torch.randint(31, (3, 2, 12), device=device)
    gold = three_steps(deepcopy(model).double(), idx, "reference")
    same = three_steps(deepcopy(model), idx, "reference")
    for got, theirs, truth in zip(three_steps(model, idx, "triton"), same, gold, strict=True):
        assert set(got) == set(truth)
        for name, want in truth.items():
            err = (got[name].double() - want).abs().max().item()
            allowed = 2 * (theirs[name].double() - want).abs().max().item() + 1e-5
            assert err <= allowed, f"{name}: off by {err:.2e}, PyTorch allows {allowed:.2e}"


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])
def test_levels_of_recompute_keep_less_and_give_the_same_gradients(
    config: GPTConfig, device: str
) -> None:
    config = replace(config, n_layer=1)
    idx = torch.randint(31, (1, 12), device=device)
    model = GPT(config).to(device)
    kept, made = [], []
    for level in (0, 1, 2):
        again = GPT(replace(config, recompute=level)).to(device)
        again.load_state_dict(model.state_dict())
        made.append(step(again, idx, "triton"))
        with fastgpt.use("triton"):
            call = partial(again, idx[:, :-1], idx[:, 1:])
            kept.append(saved_bytes(call, again.parameters()))
    assert kept[0] > kept[1] > kept[2]
    for other in made[1:]:
        for name, want in made[0].items():
            assert torch.allclose(other[name], want, rtol=1e-4, atol=1e-6), name
