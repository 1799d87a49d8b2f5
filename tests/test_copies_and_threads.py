"""Layers, models and optimizers outlive copying, pickling, saving and other processes; ops run in
several threads at once."""

import io
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import deepcopy
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.layers import MLP, Block, CausalSelfAttention, GatedMLP, LayerNorm, RMSNorm
from fastgpt.ops import backend
from tests.op_cases import CASES, NAMES, PATHS, Case, Inputs

GPT2 = GPTConfig(8, 31, n_layer=1, n_head=2, n_embd=16)
LLAMA = GPTConfig(8, 31, 1, 2, 16, variant="llama", n_kv_head=1, qk_norm=True)
LAYERS = [
    LayerNorm(16),
    RMSNorm(16),
    CausalSelfAttention(16, 2),
    MLP(16),
    GatedMLP(16, 24),
    Block(16, 2),
    Block(16, 2, gated=True, n_inner=24),
]


def through_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def through_a_file(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [deepcopy, through_pickle, through_a_file]
ways = pytest.mark.parametrize("way", WAYS)
models = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


def called(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x, x) if isinstance(layer, Block) else layer(x)
    y: Tensor = out[0] if isinstance(out, tuple) else out
    return y


@ways
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_copy_of_a_layer_is_its_equal_and_its_own(
    layer: nn.Module, way: Callable[[Any], Any]
) -> None:
    x = torch.randn(2, 3, 16)
    copy = way(layer)
    assert type(copy) is type(layer) and torch.equal(called(copy, x), called(layer, x))
    before = called(layer, x)
    with torch.no_grad():
        for p in copy.parameters():
            p.add_(1.0)
    assert torch.equal(called(layer, x), before)
    assert not torch.equal(called(copy, x), before)


@ways
@models
def test_a_copy_of_a_model_is_its_equal(config: GPTConfig, way: Callable[[Any], Any]) -> None:
    model = GPT(config)
    x = torch.randint(31, (2, 8))
    model(x, x).backward()
    copy = way(model)
    assert copy.config == config and copy.output_weight is copy.wte.weight
    assert torch.equal(copy(x), model(x))
    assert isinstance(copy.configure_optimizer(1e-3), fastgpt.optim.AdamW)


def trained(model: GPT, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 2) -> None:
    for _ in range(steps):
        model(x, x).backward()
        optimizer.step()
        optimizer.zero_grad()


@ways
def test_a_copy_of_model_and_optimizer_trains_on_to_the_same_bits(
    way: Callable[[Any], Any],
) -> None:
    model = GPT(GPT2)
    x = torch.randint(31, (2, 8))
    optimizer = model.configure_optimizer(1e-2, max_grad_norm=1.0, skip_nonfinite=True)
    trained(model, optimizer, x)
    copy, its = way((model, optimizer))
    assert its.max_grad_norm == 1.0 and its.skip_nonfinite
    trained(model, optimizer, x)
    trained(copy, its, x)
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(p, q)


@models
def test_states_load_where_only_weights_may(config: GPTConfig) -> None:
    """torch.load(weights_only=True), which runs no code of the file's."""
    model = GPT(config)
    x = torch.randint(31, (2, 8))
    optimizer = model.configure_optimizer(1e-2, max_grad_norm=1.0)
    trained(model, optimizer, x)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = GPT(config)
    again.load_state_dict(state["model"])
    its = again.configure_optimizer(1.0, max_grad_norm=1.0)
    its.load_state_dict(state["optimizer"])
    trained(model, optimizer, x)
    trained(again, its, x)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def _loss_in_a_process(model: GPT, x: Tensor, answer: Any) -> None:
    loss = model(x, x)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    answer.put((loss.item(), norm.item()))


def test_a_spawned_process_gets_the_model_and_gives_the_same_bits() -> None:
    model, x = GPT(GPT2), torch.randint(31, (2, 8))
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_loss_in_a_process, args=(model, x, answer))
    process.start()
    got = answer.get(timeout=120)
    process.join()
    _loss_in_a_process(model, x, answer)
    assert got == answer.get(timeout=10)


# Threads


def both(case: Case, x: Inputs) -> list[Tensor]:
    made = case.outputs(**x)
    dys = [torch.cos(y.detach()) for y in made]
    return [*made, *torch.autograd.grad(made, case.wanted(x), dys)]


@pytest.mark.parametrize("path", PATHS, ids=["plain", "kernel"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_threads_at_once_get_the_same_bits(
    case: Case, path: Callable[[], AbstractContextManager[None]]
) -> None:
    """Forward and backward, again and again: also the proof that one call's bits are the next's."""
    x = case.leaves()
    with path():
        want = both(case, x)
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _: both(case, x), range(8)):
                for g, w in zip(got, want, strict=True):
                    assert torch.equal(g, w)


def test_threads_train_models_of_their_own_as_one_after_the_other_would() -> None:
    def run(n: int) -> list[Tensor]:
        model = deepcopy(first)
        optimizer = model.configure_optimizer(1e-2, max_grad_norm=1.0)
        trained(model, optimizer, xs[n], steps=3)
        return [p.detach() for p in model.parameters()]

    first, xs = GPT(GPT2), torch.randint(31, (3, 2, 8))
    alone = [run(n) for n in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for got, want in zip(pool.map(run, range(3)), alone, strict=True):
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_the_path_is_the_processs_and_is_as_before_once_all_threads_have_left() -> None:
    """One enters "triton", another "reference" and stays when the first leaves."""
    before = backend._path
    barrier = Barrier(2, timeout=20)
    seen: dict[str, str] = {}

    def first() -> None:
        with fastgpt.use("triton"):
            barrier.wait()  # 1: first is inside
            barrier.wait()  # 2: second is inside
            seen["both inside"] = backend._path
        barrier.wait()  # 3: first has left
        barrier.wait()  # 4: second has left
        seen["both left"] = backend._path

    def second() -> None:
        barrier.wait()
        with fastgpt.use("reference"):
            barrier.wait()
            barrier.wait()
            seen["second alone"] = backend._path
        barrier.wait()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result()
    want = {"both inside": "reference", "second alone": "reference", "both left": before}
    assert seen == want


def test_a_checkpoints_second_forward_takes_the_path_of_the_first_in_any_thread() -> None:
    """The engine may run backward in a thread of its own: the path is not the thread's."""
    seen = []

    def work() -> None:
        seen.append(backend._path)

    with fastgpt.use("reference"), ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
    assert seen == ["reference"]
