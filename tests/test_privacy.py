"""DP-SGD: a sample's gradient, what a step does with it, what it costs, and what it buys."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastgpt import GPT, GPTConfig, compress, lora
from fastgpt.model import IGNORE
from tests.conftest import ROOT

pytest.importorskip("opacus")
from opacus.accountants import PRVAccountant
from opacus.grad_sample import GradSampleModule

from fastgpt.privacy import PerSample, PrivacyConfig, exposure, sample_losses, train_private

V, T = 31, 8
CONFIG = PrivacyConfig(epsilon=None, noise_multiplier=1.0, epochs=2, batch_size=8, rows=4, seed=0)


@pytest.fixture(autouse=True)
def flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """opacus sets one of cuDNN's, which torch's own test tools, once imported, forbid."""
    held = torch.backends.flags_frozen.__globals__
    monkeypatch.setitem(held, "__allow_nonbracketed_mutation_flag", True)


def model(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=2, n_head=4, n_embd=32, **options))


def samples(n: int) -> tuple[Tensor, Tensor]:
    """With other numbers of targets each."""
    generator = torch.Generator().manual_seed(1)
    idx, targets = torch.randint(V, (2, n, T), generator=generator)
    for row in range(n):
        targets[row, : row % T] = IGNORE
    return idx, targets


def adapted(gpt: GPT) -> GPT:
    lora.add(gpt, lora.LoraConfig(rank=2))
    for _, layer in lora.layers(gpt):
        torch.nn.init.normal_(layer.lora_B)
    return gpt


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"variant": "llama", "n_kv_head": 2}, {"lora": True}], ids=str
)
def test_each_samples_gradient_is_that_of_a_loop(options: dict[str, Any]) -> None:
    """Through GPT's own loss head and fused feed-forward, a sample at a time."""
    with_lora = options.pop("lora", False)
    gpt = model(**options).double()
    gpt = adapted(gpt) if with_lora else gpt
    idx, targets = samples(5)
    want = gpt(idx)
    hooked = GradSampleModule(PerSample(gpt))
    logits = hooked(idx)
    torch.testing.assert_close(logits, want)
    sample_losses(logits, targets).mean().backward()
    got: dict[str, Any] = {
        name: vars(p)["grad_sample"] for name, p in gpt.named_parameters() if p.requires_grad
    }
    hooked.to_standard_module()
    for n in range(5):
        gpt.zero_grad()
        gpt(idx[n : n + 1], targets[n : n + 1]).backward()
        for name, p in gpt.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(got[name][n], p.grad, msg=name)


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e3])
def test_a_step_adds_clipped_gradients_and_noise_of_the_size_it_says(max_grad_norm: float) -> None:
    """What a step of SGD would move the weights by, against the formula written out."""
    gpt, (idx, targets) = model(), samples(32)
    c = replace(CONFIG, max_grad_norm=max_grad_norm, batch_size=32, rows=32, epochs=1)
    moved: list[Tensor] = []

    def keep(optimizer: Any, *_: Any) -> None:
        moved.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]).clone())

    handle = register_optimizer_step_pre_hook(keep)
    try:
        start = {k: v.clone() for k, v in gpt.state_dict().items()}
        (spent,) = train_private(gpt, idx, targets, c)
    finally:
        handle.remove()
    gpt.load_state_dict(start)
    total = torch.zeros_like(moved[0])
    for n in range(32):  # q is 1: every sample is drawn
        grads = torch.autograd.grad(gpt(idx[n : n + 1], targets[n : n + 1]), gpt.parameters())
        g = torch.cat([g.flatten() for g in grads])
        total += g * min(1.0, max_grad_norm / float(g.norm()))
    noise = (moved[0] * 32 - total) / (spent.noise_multiplier * max_grad_norm)
    n = len(noise)
    assert abs(float(noise.mean())) < 5 / math.sqrt(n)
    assert abs(float(noise.var()) - 1.0) < 5 * math.sqrt(2 / n)
    assert spent.clipped == (max_grad_norm < 1.0)


def test_what_is_spent_is_what_the_accountant_says_and_at_most_what_was_allowed() -> None:
    idx, targets = samples(40)
    spent = list(
        train_private(model(), idx, targets, replace(CONFIG, epsilon=3.0, noise_multiplier=None))
    )
    assert spent[0].epsilon < spent[1].epsilon <= 3.0
    last = spent[1]
    assert (last.sample_rate, last.steps, last.delta) == (0.2, 10, 1 / 400)
    accountant = PRVAccountant()
    accountant.history = [(last.noise_multiplier, last.sample_rate, last.steps)]
    assert last.epsilon == pytest.approx(accountant.get_epsilon(last.delta))


def test_a_seed_gives_the_same_weights_and_none_others() -> None:
    idx, targets = samples(16)
    ends = []
    for seed in (3, 3, None, None):
        gpt = model(dropout=0.0)
        list(train_private(gpt, idx, targets, replace(CONFIG, seed=seed)))
        ends.append(gpt.wte.weight.detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[2], ends[3])


def test_the_model_is_left_without_hooks_or_gradients_of_samples() -> None:
    gpt, (idx, targets) = model().eval(), samples(16)
    next(iter(train_private(gpt, idx, targets, CONFIG)))  # stopped after one epoch
    assert not gpt.training
    assert all(not m._forward_hooks and not m._backward_hooks for m in gpt.modules())
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in gpt.parameters())


def test_only_what_requires_a_gradient_is_trained() -> None:
    gpt, (idx, targets) = adapted(model()), samples(16)
    before = {k: v.clone() for k, v in gpt.state_dict().items()}
    list(train_private(gpt, idx, targets, CONFIG))
    changed = {k for k, v in gpt.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if "lora_" in k}


def test_noise_hides_a_secret_that_training_without_it_gives_away() -> None:
    """A row is planted; without privacy it becomes the likeliest of all, with it one among many."""
    idx, targets = samples(64)
    secret = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9])
    idx[:4], targets[:4] = secret[:-1], secret[1:]
    candidates = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    at = 8 * V + 9
    found = {}
    for noise in (0.0, 4.0):
        gpt = model()
        c = replace(CONFIG, noise_multiplier=noise, epochs=30, batch_size=16, lr=1e-2, rows=16)
        *_, spent = train_private(gpt, idx, targets, c)
        assert math.isinf(spent.epsilon) == (noise == 0.0)
        found[noise] = exposure(gpt, secret[:-2].tolist(), candidates, at)
    assert found[0.0] == pytest.approx(math.log2(V * V))
    assert found[4.0] < 5.0


def test_exposure_is_the_rank_of_a_written_out_probability() -> None:
    gpt = model().eval()
    candidates = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    prefix = [3, 1]
    with torch.no_grad():
        scores = []
        for row in candidates.tolist():
            p = gpt(torch.tensor([prefix + row]))[0].log_softmax(-1)
            scores.append(float(p[1, row[0]] + p[2, row[1]]))
    for at in (0, 7, 24):
        rank = sorted(scores, reverse=True).index(scores[at]) + 1
        assert exposure(gpt, prefix, candidates, at, rows=4) == pytest.approx(math.log2(25 / rank))


@pytest.mark.parametrize(
    ("act", "error", "said"),
    [
        (lambda: PerSample(compress(model_of_32(), "int8")), NotImplementedError, "int8"),
        (lambda: PerSample(model(variant="llama", qk_norm=True)), NotImplementedError, "qk_norm"),
        (
            lambda: PrivacyConfig(epsilon=0.0),
            ValueError,
            "epsilon must be positive",
        ),
        (lambda: PrivacyConfig(delta=1.0), ValueError, r"delta must lie in \(0, 1\); got 1.0"),
        (lambda: train_private(model(), *samples(4), CONFIG), ValueError, "at least batch_size 8"),
        (
            lambda: train_private(model(), samples(9)[0], samples(8)[1], CONFIG),
            ValueError,
            r"both be \(N, T\); got \(9, 8\) and \(8, 8\)",
        ),
        (
            lambda: exposure(model(), [1], torch.zeros(3, 1, dtype=torch.int64), 3),
            ValueError,
            "a row of 3 candidates after a prefix; got 3 after 1 ids",
        ),
        (lambda: PrivacyConfig(noise_multiplier=1.0), ValueError, "one of epsilon and noise"),
        (lambda: PrivacyConfig(None, -1.0), ValueError, "must not be negative; got -1.0"),
    ],
)
def test_bad_input(act: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        act()


def model_of_32() -> GPT:
    return GPT(GPTConfig(block_size=T, vocab_size=32, n_layer=1, n_head=2, n_embd=32))


def test_the_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("chatterbot_corpus")
    done = subprocess.run(
        [sys.executable, "-m", "examples.private", "--epochs", "1", "--public-steps", "2",
         "--samples", "200", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "result.json").read_text())
    assert list(told) == ["public text only", "tuned", "tuned, epsilon 8"]
    assert told["tuned, epsilon 8"]["epsilon"] <= 8.0
