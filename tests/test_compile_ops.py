"""torch.compile and torch.export over every op and the model: whole graphs, one for all sizes.

Each runs twice: in plain PyTorch, and on the way of its kernel, autograd Function and registered
op, which is what is compiled on a GPU.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.export import Dim, export

from fastgpt import GPT, GPTConfig, ops
from fastgpt.layers import MLP, Block, CausalSelfAttention, GatedMLP, KVCache, LayerNorm, RMSNorm
from tests.op_cases import CASES, PATHS, Case, registered
from tests.test_checkpointing import WAYS, checkpointed

Path = Callable[[], AbstractContextManager[None]]
GPT2 = GPTConfig(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=32, dropout=0.2)
LLAMA = GPTConfig(
    24, 31, 2, 4, 32, dropout=0.2, variant="llama", n_kv_head=2, n_inner=48, qk_norm=True
)
both_paths = pytest.mark.parametrize("path", PATHS, ids=["plain", "kernel"])
models = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of another test's, and an error instead of a second compilation."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def grads(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves, [torch.cos(y.detach()) for y in outputs])


# Plain PyTorch takes seconds to trace where it makes masks; each op's own tests compile more of it.
QUICK = [
    pytest.param(path, case, id=f"{case.name}-{kind}")
    for case in CASES
    for path, kind in zip(PATHS, ("plain", "kernel"), strict=True)
    if path is registered or (case.name == case.op and case.op != "attention_varlen")
]


@pytest.mark.parametrize("path, case", QUICK)
def test_an_op_is_one_graph_for_three_sizes_forward_and_backward(path: Path, case: Case) -> None:
    compiled = torch.compile(case.outputs, fullgraph=True, dynamic=True, backend="aot_eager")
    with path():
        for n in (5, 7, 6):
            x = case.leaves(n)
            got, want = compiled(**x), case.outputs(**x)
            leaves = case.wanted(x)
            for g, w in zip(got + grads(got, leaves), want + grads(want, leaves), strict=True):
                assert torch.equal(g, w) and g.dtype == w.dtype and g.stride() == w.stride()


def _self_attention(x: Tensor) -> Tensor:
    y: Tensor = ops.attention(x, x, x)
    return y


def _twice_a_norm(x: Tensor) -> Tensor:
    y, h = ops.layer_norm(x, x[0, 0, 0], x[0, 0, 0], residual=x)
    return y + h


@both_paths
@pytest.mark.parametrize("f", [_self_attention, _twice_a_norm])
def test_one_tensor_may_be_several_arguments(f: Callable[..., Tensor], path: Path) -> None:
    x = torch.randn(2, 5, 2, 8, requires_grad=True)
    with path():
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        (got,), (want,) = grads((compiled(x),), [x]), grads((f(x),), [x])
    torch.testing.assert_close(got, want)


def test_the_table_has_every_op() -> None:
    public = {name for name in ops.__all__ if f"{name}_ref" in ops.__all__}
    assert {case.op for case in CASES} | {"adamw", "attention_decode"} == public  # no derivatives


def test_a_path_is_chosen_inside_a_graph_and_a_new_one_makes_a_new_graph() -> None:
    """use() may be entered in what is compiled; entered outside, a graph of another path is not
    taken again."""
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    def inside(x: Tensor) -> Tensor:
        with ops.use("reference"):
            return ops.layer_norm(x, x[0])

    x = torch.randn(3, 8)
    assert torch.equal(torch.compile(inside, fullgraph=True, backend=count)(x), inside(x))
    assert graphs == 1 and ops.backend._uses == [ops.backend._path]
    compiled = torch.compile(lambda x: ops.rms_norm(x, x[0]), fullgraph=True, backend=count)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for path, total in (("auto", 2), ("reference", 3), ("reference", 3), ("auto", 3)):
            with ops.use(path):
                compiled(x)
            assert graphs == total, path


def test_dropout_draws_as_it_does_eagerly() -> None:
    """No seed given: it comes from the generator, in the graph, anew at each call."""
    case = next(c for c in CASES if c.name == "layer_norm residual, dropout")
    x = case.leaves()
    del x["seed"]
    with registered():
        compiled = torch.compile(case.outputs, fullgraph=True, backend="aot_eager")
        torch.manual_seed(3)
        first, second = compiled(**x)[1], compiled(**x)[1]
        torch.manual_seed(3)
        assert torch.equal(first, case.outputs(**x)[1])
        assert torch.equal(second, case.outputs(**x)[1]) and not torch.equal(first, second)


def steps(model: nn.Module, call: Callable[..., Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """The loss and all gradients, with dropout from a generator that starts anew."""
    torch.manual_seed(1)
    loss = call(x, y)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@both_paths
@models
def test_a_models_training_step_is_one_graph_for_three_sizes(config: GPTConfig, path: Path) -> None:
    model = GPT(config if path is registered else replace(config, n_layer=1))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with path():
        for B, T in ((3, 7), (2, 5), (4, 11)):
            x, y = torch.randint(31, (2, B, T))
            for g, w in zip(steps(model, compiled, x, y), steps(model, model, x, y), strict=True):
                assert torch.equal(g, w)


@both_paths
@models
def test_decoding_is_compiled_twice_however_long_it_goes_on(config: GPTConfig, path: Path) -> None:
    """For the prompt, and once more for all steps: the cache's length is a symbol from then on."""
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    model = GPT(config).eval()

    def step(token: Tensor, cache: KVCache) -> Tensor:
        return model.logits(model.hidden(token, cache)[:, -1])

    compiled = torch.compile(step, fullgraph=True, backend=count)
    caches = model.new_cache(2), model.new_cache(2)
    token = torch.randint(31, (2, 4))
    recompiles = torch._dynamo.config.patch(error_on_recompile=False)
    with path(), torch.inference_mode(), recompiles:
        for _ in range(8):
            got, want = (f(token, c) for f, c in zip((compiled, step), caches, strict=True))
            assert torch.equal(got, want)
            token = want.argmax(-1)[:, None]
    assert graphs == 2 and caches[0].length == caches[1].length == 11


@pytest.mark.parametrize("way", ["not reentrant", "selective"])
def test_a_checkpointed_model_in_mixed_precision_is_one_graph(way: str) -> None:
    model = GPT(GPT2)
    checkpointed(model, WAYS[way])
    x, y = torch.randint(31, (2, 2, 9))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with registered(), torch.autocast("cpu", torch.bfloat16):
        for g, w in zip(steps(model, compiled, x, y), steps(model, model, x, y), strict=True):
            torch.testing.assert_close(g, w, atol=2e-3, rtol=2e-2)  # casts meet in another order


def test_an_optimizers_step_is_one_graph() -> None:
    """The kernel's op, which writes lists of tensors in place; with the clipping in it."""
    models, x = [GPT(GPTConfig(8, 31, 1, 2, 16))], torch.randint(31, (2, 8))
    models.append(deepcopy(models[0]))
    optimizers = [m.configure_optimizer(1e-2, max_grad_norm=1.0) for m in models]
    compiled = torch.compile(optimizers[1].step, fullgraph=True, backend="aot_eager")
    recompiles = torch._dynamo.config.patch(error_on_recompile=False)  # the state is there, then
    with registered(), recompiles:
        for _ in range(3):
            for model, make in zip(models, (optimizers[0].step, compiled), strict=True):
                model.zero_grad()
                model(x, x).backward()
                make()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.skipif(not (which("g++") or which("clang++")), reason="needs a C++ compiler")
def test_inductors_training_step_is_the_eager_one() -> None:
    """Generated code for the CPU, where plain PyTorch is what is compiled."""
    model = GPT(GPTConfig(16, 31, n_layer=1, n_head=2, n_embd=16))
    x, y = torch.randint(31, (2, 2, 9))
    compiled = torch.compile(model, fullgraph=True)
    for g, w in zip(steps(model, compiled, x, y), steps(model, model, x, y), strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)


def test_a_compiled_step_has_no_second_derivative_and_says_so() -> None:
    x = torch.randn(2, 5, 2, 8, requires_grad=True)
    compiled = torch.compile(_self_attention, fullgraph=True, backend="aot_eager")
    with registered():
        (grad,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


# torch.export

BATCH, TIME = Dim("B"), Dim("T", max=24)
SIZES = {0: BATCH, 1: TIME}


def exports_whole(
    model: nn.Module, arguments: Callable[[int, int], tuple[Tensor, ...]]
) -> set[str]:
    """Exports, runs at other sizes, equals; -> fastgpt's ops in the graph."""
    some = arguments(3, 7)
    program = export(model, some, dynamic_shapes=(SIZES,) * len(some))
    run = program.module()
    for B, T in ((3, 7), (2, 1), (4, 11)):
        args = arguments(B, T)
        torch.testing.assert_close(run(*args), model(*args))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {name.split(".")[1] for name in called if name.startswith("fastgpt.")}


OPS = {"embedding_fwd", "attention_fwd", "ffn_fwd"}
OF_A_MODEL = {
    "gpt2": OPS | {"layer_norm_fwd"},
    "llama": OPS | {"rms_norm_fwd", "rotary_fwd"},
}


@both_paths
@pytest.mark.parametrize("loss", [False, True], ids=["logits", "loss"])
@models
def test_a_model_exports_with_dynamic_batch_and_time(
    config: GPTConfig, loss: bool, path: Path
) -> None:
    def arguments(B: int, T: int) -> tuple[Tensor, ...]:
        return tuple(torch.randint(31, (1 + loss, B, T)))

    with path():
        called = exports_whole(GPT(config).eval(), arguments)
    head = {"linear_cross_entropy_fwd"} if loss else set()
    assert called == head | (OF_A_MODEL[config.variant] if path is registered else set())


def test_an_exported_model_is_saved_and_loaded() -> None:
    model, x = GPT(GPT2).eval(), torch.randint(31, (2, 9))
    file = io.BytesIO()
    with registered():
        torch.export.save(export(model, (x, x), strict=True), file)
        file.seek(0)
        assert torch.equal(torch.export.load(file).module()(x, x), model(x, x))


LAYERS = [
    (LayerNorm(32), 1, {"layer_norm_fwd"}),
    (LayerNorm(32), 2, {"layer_norm_fwd"}),
    (RMSNorm(32), 1, {"rms_norm_fwd"}),
    (RMSNorm(32), 2, {"rms_norm_fwd"}),
    (CausalSelfAttention(32, 2), 1, {"attention_fwd"}),
    (CausalSelfAttention(32, 4, n_kv_head=2), 1, {"attention_fwd"}),
    (MLP(32), 1, {"ffn_fwd"}),
    (GatedMLP(32, 48), 1, {"ffn_fwd"}),
    (Block(32, 2), 2, {"layer_norm_fwd", "attention_fwd", "ffn_fwd"}),
    (Block(32, 2, gated=True, n_inner=48), 2, {"rms_norm_fwd", "attention_fwd", "ffn_fwd"}),
]


@both_paths
@pytest.mark.parametrize("layer, streams, called", LAYERS, ids=lambda v: type(v).__name__)
def test_a_layer_exports_with_dynamic_batch_and_time(
    layer: nn.Module, streams: int, called: set[str], path: Path
) -> None:
    def arguments(B: int, T: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(streams, B, T, 32))

    with path():
        assert exports_whole(layer.eval(), arguments) == (called if path is registered else set())
