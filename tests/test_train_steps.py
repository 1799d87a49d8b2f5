"""A step of training: what is not finite, 16 bits, parts of a batch, torch.compile."""

import math
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.data import Batch, Part, Sampler
from fastgpt.train import Step, Trainer
from fastgpt.train.checkpoint import Checkpointer, checkpoints
from fastgpt.train.device import named_peak, peak_flops, peak_memory
from fastgpt.train.loop import split
from fastgpt.train.run import run
from tests.train_runs import TEXT, trainer


def weights(t: Trainer) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in t.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def told(steps: Iterable[Step]) -> list[str]:
    """As text, where nan is nan."""
    return [f"{s.step} {s.loss} {s.grad_norm} {s.skipped}" for s in steps]


def spoil(t: Trainer, steps: set[int], value: float = math.nan) -> None:
    """Make a forward activation of these steps, counted from 1, not finite."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        bad = t.steps_done + 1 in steps and t.model.training
        return output * value if bad else output

    t.model.ln_f.register_forward_hook(lambda m, a, o: (hook(m, a, o[0]), o[1]))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    precision: str, name: str
) -> None:
    t = trainer({"optim.name": name}, precision=precision)
    spoil(t, {3})
    t.step()
    t.step()
    before = weights(t)
    moments = [{k: v.clone() for k, v in s.items()} for s in t.optimizer.state.values()]
    made = t.step()
    assert not math.isfinite(made.loss)
    assert made.skipped == 1
    assert same(before, weights(t))
    for was, now in zip(moments, t.optimizer.state.values(), strict=True):
        assert all(torch.equal(was[k], now[k]) for k in was)
    after = t.step()
    assert math.isfinite(after.loss)
    assert after.skipped == 1
    assert not same(before, weights(t))


def test_one_bad_forward_pass_spoils_the_step_it_belongs_to() -> None:
    t = trainer({"batch.tokens": 8 * 16, "batch.rows": 2})
    assert t.passes == 4
    calls = 0

    def hook(module: Any, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return (output[0] * math.inf, output[1]) if calls == 2 else output

    t.model.ln_f.register_forward_hook(hook)
    before = weights(t)
    assert t.step().skipped == 1
    assert same(before, weights(t))


def test_a_run_stops_after_so_many_in_a_row_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    t = trainer({"max_skipped": 3, "checkpoint.every": 2, "steps": 20})
    spoil(t, {2, 3, 5, 7, 8, 9, 10})
    with pytest.raises(
        FloatingPointError,
        match=r"^train: losses and gradients must be finite; those of the last 3 steps, up to step"
        r" 9, are not$",
    ):
        run(t, tmp_path)
    newest = checkpoints(tmp_path)[0]
    assert newest.name == "step-00000008"
    again = trainer({"max_skipped": 3, "steps": 20})
    again.restore(Checkpointer(tmp_path), newest)
    assert again.step().skipped == 5
    assert all(p.isfinite().all() for p in again.model.parameters())


def test_float16_scales_its_loss_and_resumes_exactly(tmp_path: Path) -> None:
    whole = trainer(precision="float16")
    assert whole.scaler.is_enabled()
    start = whole.scaler.get_scale()
    spoil(whole, {2})
    losses = [whole.step() for _ in range(8)]
    assert whole.scaler.get_scale() == start / 2

    first = trainer(precision="float16")
    spoil(first, {2})
    assert told(first.step() for _ in range(4)) == told(losses[:4])
    saver = Checkpointer(tmp_path)
    first.save(saver, {})
    second = trainer(precision="float16")
    folder = saver.latest()
    assert folder is not None
    second.restore(saver, folder)
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert told(second.step() for _ in range(4)) == told(losses[4:])
    assert same(weights(whole), weights(second))


def test_float16_learns_what_float32_does() -> None:
    low, full = (
        trainer({"model.dropout": 0.0}, precision=p, steps=40) for p in ("float16", "float32")
    )
    made = [(low.step(), full.step()) for _ in range(40)]
    assert made[-1][0].loss == pytest.approx(made[-1][1].loss, rel=0.02)
    assert made[0][0].grad_norm == pytest.approx(made[0][1].grad_norm, rel=0.02)


class ReadsBack(TorchDispatchMode):
    """Counts what makes the host wait for a GPU, but for what the ops look at on a CPU only."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            files = [frame.filename for frame in traceback.extract_stack()]
            self.count += not any("/fastgpt/ops/" in name for name in files)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_host_waits_where_it_logs_and_nowhere_else(precision: str) -> None:
    t = trainer({"log.every": 3, "batch.rows": 2, "batch.tokens": 64}, precision=precision)
    with ReadsBack() as reads:
        t.step()
        made = t.step()
        assert reads.count == 0
        assert float(made.values[0]) > 0.0
        assert reads.count == 1
    unread = t.step()
    assert "_numbers" in vars(unread)
    assert "_numbers" not in vars(t.step())


def batches(packing: str) -> tuple[Sampler, Batch]:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 200, n).tolist() for n in rng.integers(2, 40, 60)]
    sampler = Sampler(Part.of(documents), 16, 12, 0, packing)
    return sampler, sampler(0)


@pytest.mark.parametrize("packing", ["concat", "documents"])
@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_a_batch_is_cut_into_whole_rows(packing: str, parts: int) -> None:
    _, whole = batches(packing)
    cut = split(whole, parts)
    assert len(cut) == parts
    assert torch.equal(torch.cat([b.idx for b in cut]), whole.idx)
    assert torch.equal(torch.cat([b.targets for b in cut]), whole.targets)
    if packing == "documents":
        assert whole.cu_seqlens is not None
        lengths = [b.cu_seqlens.diff() for b in cut if b.cu_seqlens is not None]
        assert torch.equal(torch.cat(lengths), whole.cu_seqlens.diff())
        assert all(b.cu_seqlens is not None and b.cu_seqlens[0] == 0 for b in cut)


def test_passes_weigh_by_the_tokens_that_take_part() -> None:
    """Documents leave padding, so that the passes of a step hold different numbers of targets."""
    changes: dict[str, Any] = {"data.packing": "documents", "model.dropout": 0.0}
    changes |= {"model.block_size": 64, "precision": "float32"}
    documents = TEXT.split("\n\n")
    one = trainer({**changes, "batch.rows": 8}, documents)
    four = trainer({**changes, "batch.rows": 2, "batch.tokens": 8 * 64}, documents)
    counts = [int((b.targets >= 0).sum()) for b in split(four.batches(0), 4)]
    assert len(set(counts)) > 1
    for _ in range(3):
        a, b = one.step(), four.step()
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)


@pytest.mark.slow
def test_compiled_steps_are_the_steps() -> None:
    changes = {"model.n_layer": 1, "model.dropout": 0.0}
    plain = trainer(changes, precision="float32")
    compiled = trainer(changes, precision="float32", compile=True)
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()
    for _ in range(3):
        a, b = plain.step(), compiled.step()
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert compiled.evaluate().loss == pytest.approx(plain.evaluate().loss, rel=1e-5)


def test_a_text_is_written_on_the_way() -> None:
    t = trainer({"eval.samples": 2, "eval.prompt": "In year ", "eval.sample_tokens": 5})
    first, again = t.write(), t.write()
    assert first == again
    assert len(set(first)) == 2
    assert all(text.startswith("In year ") for text in first)
    assert t.model.training
    with pytest.raises(ValueError, match=r"^eval: the prompt must leave room in the context of 16"):
        trainer({"eval.samples": 1, "eval.prompt": "白日依山尽" * 9}).write()


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA L4", 121.0), ("NVIDIA L40S", 362.0),
        ("AMD Instinct MI300X", 1307.0), ("NVIDIA A10", 125.0), ("Tesla T4", 65.0),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)  # fmt: skip
def test_peaks_go_by_the_name_of_the_device(name: str, tflops: float | None) -> None:
    assert named_peak(name) == (None if tflops is None else pytest.approx(1e12 * tflops))


def test_a_cpu_has_no_peak_but_memory() -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    memory = peak_memory(torch.device("cpu"))
    assert memory is not None
    assert 2**26 < memory < 2**40


def test_a_loss_that_alone_is_not_finite_skips_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer()
    loss = t.layout.loss
    monkeypatch.setattr(
        t.layout, "loss", lambda *args: loss(*args) + (math.inf if t.steps_done == 1 else 0.0)
    )  # a constant: its gradient is finite
    t.step()
    before = weights(t)
    assert t.step().skipped == 1
    assert same(before, weights(t))
