"""What the GPU at hand takes: every kernel beside others' ways, and GPT-2's training step.

    python -m benchmarks.gpu --markdown docs/gpu.md

A provider whose values are not PyTorch's to 2 % is not timed. Kernels are timed by the GPU's
events, with the level 2 cache flushed and the host ahead, in turns, as medians; a step by the
clock, with everything the host does in it. Peers are used where they are installed.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.static.step import Plain, hugging_face
from fastgpt import patch
from fastgpt.bench.case import Case
from fastgpt.bench.ops import OPS
from fastgpt.bench.timing import host_seconds, seconds
from fastgpt.lab.files import write_whole
from fastgpt.model import GPT, GPTConfig
from fastgpt.optim import AdamW
from fastgpt.train import CapturedStep

AGAINST = (
    "fastgpt", "torch", "flash", "cuDNN", "liger", "cut", "torch fused", "torch foreach",
)  # fmt: skip
BEGIN, END = "<!-- begin: python -m benchmarks.gpu -->", "<!-- end: python -m benchmarks.gpu -->"


@dataclass(frozen=True)
class Measured:
    """Medians of one case: forward, and backward as the difference of both to forward; seconds."""

    case: str
    provider: str
    forward: float
    backward: float | None
    host: float
    flops: int


def measure(case: Case, rounds: int) -> Iterator[Measured]:
    ways = {}
    for provider in case.providers:
        if provider not in AGAINST:
            continue
        try:
            wrong = case.wrong(provider, "forward")
        except (RuntimeError, ValueError, ImportError) as error:
            print(f"{case.name}: {provider} does not run: {str(error).splitlines()[0]}")
            continue
        if wrong:
            print(f"{case.name}: {provider} is not timed, {wrong}")
            continue
        ways[provider] = [case.start(provider, "forward")]
        if case.has_backward:
            ways[provider].append(case.start(provider, "both"))
    taken: dict[str, list[list[float]]] = {p: [[] for _ in steps] for p, steps in ways.items()}
    for _ in range(rounds):
        for provider, steps in ways.items():
            for n, step in enumerate(steps):
                taken[provider][n].append(seconds(step, "cuda"))
    for provider, times in taken.items():
        forward, *both = (statistics.median(t) for t in times)
        yield Measured(
            case.name, provider, forward, both[0] - forward if both else None,
            host_seconds(ways[provider][0]), case.flops,
        )  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """A training step: milliseconds, tokens a second, peak bytes, kernels the GPU ran."""

    provider: str
    seconds: float
    tokens: int
    peak: int
    kernels: int
    busy: float


def launched(step: Callable[[], Any]) -> tuple[int, float]:
    """Kernels that a step runs on the GPU, and the seconds they take."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    events = [e for e in seen.events() or () if "CUDA" in str(e.device_type)]
    ran = [e for e in events if e.name[:3] != "Mem"]
    return len(ran), sum(e.device_time for e in ran) / 1e6


def time_step(provider: str, make: Callable[[], nn.Module], how: str, B: int, T: int) -> StepTime:
    """Of bfloat16 weights, no dropout. how: "eager", "compiled" or "captured"."""
    torch.cuda.empty_cache()
    model = make().to("cuda", torch.bfloat16)
    params = list(model.parameters())
    own = isinstance(model, GPT)
    optimizer: torch.optim.Optimizer
    if own:
        optimizer = AdamW(params, 1e-4, max_grad_norm=1.0)
    else:
        optimizer = torch.optim.AdamW(params, 1e-4, fused=True, capturable=how == "captured")
    run = torch.compile(model) if how == "compiled" else model

    def step(idx: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = run(idx, targets)
        loss.backward()
        if not own:
            nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return loss.detach()

    idx = torch.randint(50257, (B, T + 1), device="cuda")
    inputs = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    call: Callable[[], Any] = partial(step, *inputs)
    if how == "captured":
        call = partial(CapturedStep(step, *inputs), *inputs)
    for _ in range(4):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    kernels, busy = launched(call)
    peak = (
        torch.cuda.max_memory_reserved() if how == "captured" else torch.cuda.max_memory_allocated()
    )
    name = provider if how == "eager" else f"{provider}, {how}"
    return StepTime(name, statistics.median(times), B * T, peak, kernels, busy)


def patched(make: Callable[[], nn.Module]) -> nn.Module:
    model = make().to("cuda", torch.bfloat16).train()
    patch(model)
    return model


def steps(B: int, T: int) -> Iterator[StepTime]:
    """GPT-2 small: ours, as nanoGPT writes it, and Hugging Face's."""
    shape = (12, 12, 768, 50257, T)
    ours = partial(GPT, GPTConfig(T, 50257, 12, 12, 768))
    for how in ("captured", "eager"):
        yield time_step("fastgpt", ours, how, B, T)
    for vocabulary in (50304, 50257):  # nanoGPT's, padded to a multiple of 64, and GPT-2's
        plain = partial(Plain, 12, 12, 768, vocabulary, T)
        for how in ("captured", "compiled", "eager"):
            yield time_step(f"nanoGPT-like, {vocabulary} ids", plain, how, B, T)
    if find_spec("transformers"):
        theirs = partial(hugging_face, *shape)
        yield time_step("Hugging Face, fastgpt.patch", partial(patched, theirs), "captured", B, T)
        yield time_step("Hugging Face, fastgpt.patch", partial(patched, theirs), "eager", B, T)
        yield time_step("Hugging Face", theirs, "eager", B, T)


def kernel_table(rows: list[Measured]) -> Iterator[str]:
    yield "| what | who | forward | backward | TFLOP/s | host |"
    yield "|---|---|---|---|---|---|"
    for r in rows:
        back = "" if r.backward is None else f"{r.backward * 1e6:.0f}"
        rate = ""
        if r.flops:
            rate = f"{r.flops / r.forward / 1e12:.0f}"
            rate += (
                ""
                if r.backward is None
                else f", {r.flops * 3 / (r.forward + r.backward) / 1e12:.0f}"
            )
        yield (
            f"| {r.case} | {r.provider} | {r.forward * 1e6:.0f} | {back} | {rate}"
            f" | {r.host * 1e6:.0f} |"
        )


def step_table(rows: list[StepTime]) -> Iterator[str]:
    yield "| who | ms | tokens/s | peak GiB | kernels | ms the GPU works |"
    yield "|---|---|---|---|---|---|"
    for r in rows:
        yield (
            f"| {r.provider} | {r.seconds * 1e3:.1f} | {r.tokens / r.seconds:,.0f}"
            f" | {r.peak / 2**30:.2f} | {r.kernels} | {r.busy * 1e3:.1f} |"
        )


def versions() -> str:
    names = ["torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy"]
    packages = {"liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
    here = [n for n in names if find_spec(packages.get(n, n))]
    return ", ".join(f"{n} {version(n)}" for n in here)


def report(rows: list[Measured], taken: list[StepTime], B: int, T: int) -> str:
    return "\n".join(
        [
            f"Measured on {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {versions()}.",
            "",
            f"### GPT-2 small, a training step of {B} x {T} tokens",
            "",
            "bfloat16 weights, no dropout, forward, backward, clipping and AdamW; torch's is fused."
            " Captured: as one CUDA graph, `fastgpt.train.CapturedStep`; its peak is what is"
            " reserved. Kernels and their time are the profiler's.",
            "",
            *step_table(taken),
            "",
            "### Kernels",
            "",
            "Microseconds, bfloat16. Host: of a forward call, with autograd. TFLOP/s: forward, and"
            " of both together where backward is counted as twice forward.",
            "",
            *kernel_table(rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--markdown", type=Path, help="put the tables into this page")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU; got none")
    torch.manual_seed(0)
    taken = []
    for one in steps(args.batch, args.context):
        print(*list(step_table([one]))[2:], flush=True)
        taken.append(one)
    rows = []
    for module in OPS.values():
        for sizes in module.sizes("cuda"):
            case = module.case("cuda", torch.bfloat16, **sizes)
            for row in measure(case, args.rounds):
                print(*list(kernel_table([row]))[2:], flush=True)
                rows.append(row)
            torch.cuda.empty_cache()
    text = report(rows, taken, args.batch, args.context)
    if args.markdown:
        page = args.markdown.read_text()
        head, _, rest = page.partition(BEGIN)
        tail = rest.partition(END)[2]
        write_whole(args.markdown, f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
    else:
        print(text)


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    main()
