"""Activation checkpointing and torch's counter of operations: both see fastgpt's ops as ops.

On a CPU, by their plain implementations; the seeds of dropout come from the generator that
checkpointing winds back.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import fastgpt
from fastgpt import GPT, GPTConfig
from tests.conftest import ROOT, SANITIZED, launched
from tests.op_cases import registered

LAYERS, T = 2, 16
ATTENTION = torch.ops.fastgpt.attention_fwd


def model_of(variant: Any, recompute: int = 1) -> GPT:
    return GPT(
        GPTConfig(T, 31, LAYERS, 2, 32, dropout=0.2, variant=variant, recompute=recompute)
    )  # fmt: skip


def save_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op == ATTENTION.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


WAYS: dict[str, Callable[..., Any]] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, save_attention),
    ),
}


def step(model: GPT, x: Tensor) -> tuple[list[Tensor], dict[Any, int]]:
    """The loss, all gradients, and what each op cost."""
    torch.manual_seed(5)
    model.zero_grad()
    with registered(), FlopCounterMode(display=False) as counter:
        loss = model(x, x)
        loss.backward()
    made = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return made, counter.get_flop_counts()["Global"]


def checkpointed(model: GPT, way: Callable[..., Any]) -> None:
    """Each block runs under checkpoint, as Hugging Face's and torchtitan's do."""
    for block in model.h:
        block.forward = partial(way, nn.Module.__getattribute__(block, "forward"))  # type: ignore[method-assign]


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("variant", ["gpt2", "llama"])
@pytest.mark.parametrize("way", list(WAYS))
def test_gradients_keep_their_bits_and_attention_runs_as_often_as_asked(
    way: str, variant: str, recompute: int
) -> None:
    model = model_of(variant, recompute)
    x = torch.randint(31, (2, T))
    want, once = step(model, x)
    checkpointed(model, WAYS[way])
    got, counts = step(model, x)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    times = 1 if way == "selective" else 2
    assert counts[ATTENTION] == times * once[ATTENTION] > 0


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZED, reason="in backward the sanitizer's tensors are on another device")
@pytest.mark.parametrize("way", list(WAYS))
def test_attentions_kernel_is_launched_as_often_as_asked(way: str, device: str) -> None:
    """On a device whose generator is its own, seeds are wound back with it."""
    grads, launches = [], []
    for of in (None, WAYS[way]):
        torch.manual_seed(5)
        model = GPT(GPTConfig(T, 31, LAYERS, 2, 32, dropout=0.2)).to(device)
        if of is not None:
            checkpointed(model, of)
        x = torch.randint(31, (1, T), device=device)
        before = launched["attention._fwd_kernel"]
        with fastgpt.use("triton"):
            model(x, x).backward()
        launches.append(launched["attention._fwd_kernel"] - before)
        grads.append([p.grad for p in model.parameters()])
    assert launches == [LAYERS, LAYERS if way == "selective" else 2 * LAYERS]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)  # a checkpointed block adds its bias elsewhere


def test_the_counter_knows_every_product_of_a_step() -> None:
    """Attention's, the feed-forward's and the loss head's, three times those of forward."""
    model = GPT(GPTConfig(T, 31, LAYERS, 2, 32))
    _, counts = step(model, torch.randint(31, (2, T)))
    scores_again = counts[torch.ops.fastgpt.attention_bwd] // 5  # q k^T is made once more
    assert sum(counts.values()) - scores_again == 2 * model.flops(T, training=True)


COUNTED = """
import sys
{first}
import fastgpt, torch
assert ("torch.utils.flop_counter" in sys.modules) == {there}
from torch.utils.flop_counter import FlopCounterMode
model = fastgpt.GPT(fastgpt.GPTConfig(8, 31, 1, 2, 16))
x = torch.randint(31, (1, 8))
with FlopCounterMode(display=False) as counter:
    model(x, x)
print(counter.get_flop_counts()["Global"][torch.ops.fastgpt.linear_cross_entropy_fwd])
"""


@pytest.mark.parametrize("there", [True, False], ids=["before fastgpt", "after fastgpt"])
def test_nobody_need_register_the_formulas(there: bool) -> None:
    first = "import torch.utils.flop_counter" if there else ""
    code = COUNTED.format(first=first, there=there)
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert got.stdout.strip() == str(3 * 2 * 8 * 16 * 31), got.stderr
