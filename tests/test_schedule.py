"""The learning rate over a run."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastgpt.train.schedule import DECAYS, KINDS, ScheduleConfig, set_learning_rate

configs = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(KINDS),
    warmup=st.integers(0, 20),
    floor=st.floats(0.0, 1.0),
    decay_share=st.floats(0.01, 1.0),
    decay=st.sampled_from(DECAYS),
)


def over(config: ScheduleConfig, steps: int = 100) -> list[float]:
    return [config.factor(n, n / steps) for n in range(steps + 1)]


@given(configs)
def test_it_rises_in_the_warm_up_and_never_after(config: ScheduleConfig) -> None:
    rates = over(config)
    top = rates.index(max(rates))
    assert top <= config.warmup
    assert all(b >= a for a, b in pairwise(rates[: top + 1]))
    assert all(b <= a + 1e-12 for a, b in pairwise(rates[top:]))
    assert all(0.0 < r <= 1.0 for r in rates[: top + 1])


@given(configs)
def test_it_ends_at_the_floor(config: ScheduleConfig) -> None:
    end = 1.0 if config.kind == "constant" else config.floor
    assert config.factor(10**6, 1.0) == pytest.approx(end, abs=1e-12)
    assert all(r >= min(end, (n + 1) / max(1, config.warmup)) - 1e-12
               for n, r in enumerate(over(config)))  # fmt: skip


def test_cosine_is_torchs() -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.2)
    config = ScheduleConfig("cosine", warmup=0, floor=0.1)
    for n in range(50):
        assert 2.0 * config.factor(n, n / 50) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_wsd_is_hugging_faces(decay: str) -> None:
    from transformers import get_wsd_schedule

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_wsd_schedule(
        optimizer, num_warmup_steps=10, num_decay_steps=25, num_training_steps=100,
        warmup_type="linear", decay_type=decay, min_lr_ratio=0.2,
    )  # fmt: skip
    config = ScheduleConfig("wsd", warmup=10, floor=0.2, decay_share=0.25, decay=decay)
    for n in range(100):
        if n >= 10:  # theirs warms up from its floor
            want = optimizer.param_groups[0]["lr"]
            assert config.factor(n, n / 100) == pytest.approx(want), n
        optimizer.step()
        theirs.step()


def test_the_decay_by_the_square_root_is_its_formula() -> None:
    config = ScheduleConfig("wsd", warmup=0, floor=0.0, decay_share=0.2, decay="sqrt")
    assert over(config)[:81] == [1.0] * 81
    assert config.factor(85, 0.85) == pytest.approx(1.0 - math.sqrt(0.25))


def test_time_counts_as_steps_do() -> None:
    config = ScheduleConfig("wsd", warmup=0, floor=0.0, decay="linear")
    assert config.factor(3, 0.9) == pytest.approx(0.5)


def test_each_group_keeps_its_own_highest_rate() -> None:
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    rate = torch.tensor(3e-3)
    optimizer = torch.optim.AdamW(
        [{"params": [a], "lr": 1e-2}, {"params": [b]}, {"params": [c], "lr": rate}], lr=1e-3
    )
    for factor in (0.5, 0.1, 1.0):
        assert set_learning_rate(optimizer, factor) == pytest.approx(3e-3 * factor)
        got = [float(g["lr"]) for g in optimizer.param_groups]
        assert got == pytest.approx([1e-2 * factor, 1e-3 * factor, 3e-3 * factor])
    assert optimizer.param_groups[2]["lr"] is rate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "step"}, "schedule: kind must be one of cosine, wsd, constant; got 'step'"),
        ({"decay": "log"}, "schedule: decay must be one of linear, sqrt, cosine; got 'log'"),
        ({"warmup": -1}, "schedule: warmup must not be negative; got -1"),
        ({"floor": 1.5}, r"schedule: floor is a share of lr, in \[0, 1\]; got 1.5"),
        ({"floor": math.nan}, "schedule: floor is a share of lr"),
        ({"decay_share": 0.0}, r"schedule: decay_share must lie in \(0, 1\]; got 0.0"),
    ],
)
def test_rejects(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**change)
