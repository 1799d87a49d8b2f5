"""What only a GPU can show: CUDA graphs of every op, torch.compile's among them; that nothing waits
for the device; streams, threads, several GPUs. `pytest tests/test_cuda.py` takes a minute or two.

A whole training step as one graph is tests/test_captured.py.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import GPT, GPTConfig, ops
from fastgpt.functional.norm import WIDENED
from fastgpt.layers import KVCache
from tests.conftest import HAS_CUDA, SANITIZED
from tests.op_cases import CASES, NAMES, Case, Inputs
from tests.test_autocast import ACTIVATIONS, COMPARED, LOW, THEIRS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA or SANITIZED, reason="only a GPU that is there shows it"),
]
every_op = pytest.mark.parametrize("case", CASES, ids=NAMES)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def both(case: Case, x: Inputs) -> tuple[Tensor, ...]:
    """Outputs and gradients."""
    made = case.outputs(**x)
    dys = [torch.cos(y.detach()) for y in made]
    return made + torch.autograd.grad(made, case.wanted(x), dys)


def on_a_side_stream(call: Callable[[], object]) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """Once called, an operation that waits for the GPU is an error."""
    try:
        yield lambda: torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_no_op_waits_for_the_gpu(case: Case, no_waiting: Callable[[], None]) -> None:
    x = case.leaves(device="cuda")
    both(case, x)  # compiles
    no_waiting()
    both(case, x)


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_no_training_step_waits_for_the_gpu(variant: str, no_waiting: Callable[[], None]) -> None:
    model = GPT(GPTConfig(16, 31, 2, 2, 32, dropout=0.1, variant=variant)).to("cuda")
    optimizer = model.configure_optimizer(1e-3, max_grad_norm=1.0, skip_nonfinite=True)
    x = torch.randint(31, (2, 16), device="cuda")
    for n in range(3):
        if n == 2:
            no_waiting()
        model(x, x).backward()
        optimizer.step()
        optimizer.zero_grad()


@every_op
def test_a_graph_of_an_op_runs_on_new_inputs_seeds_and_lengths(case: Case) -> None:
    """Forward and backward, captured; what is replayed is what an eager call gives."""
    x = case.leaves(device="cuda")
    on_a_side_stream(lambda: [both(case, x) for _ in range(3)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = both(case, x)
    fresh = case.leaves(device="cuda")
    fresh |= {"seed": torch.tensor([11], device="cuda")} if "seed" in x else {}
    if case.op == "attention_varlen":  # other lengths of two sequences, in the same room
        ends = torch.tensor([0, 3, 9], dtype=torch.int32, device="cuda")
        fresh |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    with torch.no_grad():
        for name, t in x.items():
            t.copy_(fresh[name])
    graph.replay()
    for got, want in zip(made, both(case, x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [c.name for c in CASES if "dropout" in c.name])
def test_without_a_seed_each_replay_drops_out_anew(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    x = case.leaves(device="cuda")
    del x["seed"]
    on_a_side_stream(lambda: case.outputs(**x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = case.outputs(**x)[-1].detach()
    drawn = []
    for _ in range(3):
        graph.replay()
        drawn.append(made.clone())
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def step(model: GPT, call: Callable[..., Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    loss = call(x, y)
    made = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    return [t.clone() for t in made]


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_compiled_with_cuda_graphs_a_model_trains_as_it_does_eagerly(variant: str) -> None:
    """torch.compile(mode="reduce-overhead"): inductor puts the ops, whole, into its CUDA graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = GPT(GPTConfig(32, 101, 2, 2, 64, variant=variant)).to("cuda")
    assert model._turns is None or model._turns[0].is_cuda
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x, y = torch.randint(101, (2, 4, 32), device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        got = step(model, compiled, x, y)
        for g, w in zip(got, step(model, model, x, y), strict=True):
            torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-3)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_compiled_with_cuda_graphs_dropout_is_drawn_anew() -> None:
    torch._dynamo.reset()
    model = GPT(GPTConfig(32, 101, 1, 2, 64, dropout=0.3)).to("cuda")
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    x, y = torch.randint(101, (2, 4, 32), device="cuda")
    losses = set()
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        losses.add(step(model, compiled, x, y)[0].item())
    assert len(losses) == 6


def test_compiled_decoding_gives_the_eager_tokens() -> None:
    torch._dynamo.reset()
    model = GPT(GPTConfig(32, 101, 2, 2, 64)).to("cuda").eval()
    for p in model.parameters():
        p.data *= 3.0  # logits far apart: rounding decides nothing

    def decode(token: Tensor, cache: KVCache) -> Tensor:
        return model.logits(model.hidden(token, cache)[:, -1]).argmax(-1)[:, None]

    def tokens(call: Callable[[Tensor, KVCache], Tensor]) -> Tensor:
        cache, made = model.new_cache(2), [prompt]
        with torch.no_grad():
            for _ in range(10):
                made.append(call(made[-1], cache))
        return torch.cat(made, 1)

    prompt = torch.randint(101, (2, 5), device="cuda")
    assert torch.equal(tokens(torch.compile(decode, fullgraph=True)), tokens(decode))


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("narrow", [False, True], ids=["float32 in", "16 bits in"])
@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
def test_autocast_gives_the_dtype_and_value_of_torchs_own(
    case: Case, narrow: bool, low: torch.dtype
) -> None:
    x = {name: t.detach() for name, t in case.leaves(device="cuda").items()}
    x |= {name: t.to(low) for name, t in x.items() if narrow and name in ACTIVATIONS}
    with torch.autocast("cuda", low), fastgpt.use("triton"):
        got, want = case.outputs(**x)[0], THEIRS[case.name](**x)
    if case.op == "attention":
        want = want.transpose(1, 2)
    if case.op == "rms_norm" and not WIDENED["rms_norm"]:
        want = want.float()  # as later versions of torch have it
    torch.testing.assert_close(got, want, atol=5e-2, rtol=5e-2)  # dtypes too


@every_op
def test_threads_on_streams_of_their_own_get_the_same_bits(case: Case) -> None:
    x = case.leaves(device="cuda")
    want = [t.clone() for t in both(case, x)]
    torch.cuda.synchronize()

    def run(_: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            made = [t.clone() for t in both(case, x)]
            torch.cuda.current_stream().synchronize()
            return made

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(run, range(8)):
            for g, w in zip(got, want, strict=True):
                assert torch.equal(g, w)


@two_gpus
@every_op
def test_an_op_runs_on_its_tensors_gpu_whichever_is_current(case: Case) -> None:
    x = case.leaves(device="cuda:0")
    there = {n: t.detach().to("cuda:1").requires_grad_(t.requires_grad) for n, t in x.items()}
    assert torch.cuda.current_device() == 0
    for got, want in zip(both(case, there), both(case, x), strict=True):
        assert got.device.index == 1
        torch.testing.assert_close(got.to("cuda:0"), want)


@two_gpus
def test_a_model_trains_on_the_other_gpu() -> None:
    model = GPT(GPTConfig(16, 31, 1, 2, 32, dropout=0.1)).to("cuda:1")
    optimizer = model.configure_optimizer(1e-2, max_grad_norm=1.0)
    x = torch.randint(31, (2, 16), device="cuda:1")
    losses = []
    for _ in range(10):
        loss = model(x, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert torch.cuda.current_device() == 0 and losses[-1] < losses[0]


def test_a_seed_is_read_on_the_device() -> None:
    """Two masks, one graph: were the seed a number of the host's, they would be one."""
    x = torch.ones(4, 64, device="cuda")
    seed = torch.tensor([1], device="cuda")
    zero = torch.zeros_like(x)

    def drop() -> Tensor:
        return ops.layer_norm(x, x[0], residual=zero, dropout_p=0.5, seed=seed)[1]

    on_a_side_stream(drop)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = drop()
    graph.replay()
    first = h.clone()
    seed.fill_(2)
    graph.replay()
    assert not torch.equal(first, h)
    assert torch.equal(h != 0, ops.dropout_mask(seed, (4, 64), 0.5))
