"""MuonAdamW and the optimizers of a training run."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt.model import GPT, GPTConfig
from fastgpt.optim import AdamW, MuonAdamW, decay_groups
from fastgpt.train.optimizer import OptimConfig

CONFIG = GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16)
LLAMA = GPTConfig(8, 32, 2, 2, 16, variant="llama", n_kv_head=1, tied=False, qk_norm=True)


def model(config: GPTConfig = CONFIG, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(1)
    return GPT(config).to(dtype)


def give_grads(params: Any, seed: int, scale: float = 1.0) -> None:
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn_like(p) * scale


def weights(m: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in m.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_is_torchs_muon_and_our_adamw() -> None:
    m, theirs = model(), model()
    ours = OptimConfig("muon", lr=1e-2, weight_decay=0.3, clip=0.0).build(m)
    hidden = [p for p in theirs.h.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in theirs.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(hidden, 1e-2, 0.3, 0.95, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(
        [{"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.3},
         {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}],
        1e-2, (0.9, 0.95),
    )  # fmt: skip
    for step in range(3):
        give_grads(m.parameters(), step)
        give_grads(theirs.parameters(), step)
        ours.step()
        muon.step()
        adamw.step()
    assert same(weights(m), weights(theirs))


def test_a_step_of_muon_is_the_orthogonal_part_of_the_momentum() -> None:
    p = nn.Parameter(torch.zeros(8, 24))
    optimizer = MuonAdamW([p], [], lr=1e-2, weight_decay=0.0, momentum=0.0)
    p.grad = torch.randn(8, 24)
    optimizer.step()
    u, _, vt = torch.linalg.svd(p.grad, full_matrices=False)
    moved = -p.detach() / (1e-2 * 0.2 * math.sqrt(24))
    # Newton and Schulz's iteration brings singular values near 1, not to it.
    values = (u.T @ moved @ vt.T).diagonal()
    assert values.min() > 0.6 and values.max() < 1.3
    assert (moved - u @ torch.diag(values) @ vt).norm() < 0.03 * moved.norm()


def test_the_gradients_are_clipped_together() -> None:
    m, other = model(), model()
    ours = OptimConfig("muon", clip=0.5).build(m)
    plain = OptimConfig("muon", clip=0.5).build(other, clip=False)
    for step in range(2):
        give_grads(m.parameters(), step)
        give_grads(other.parameters(), step)
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        ours.step()
        plain.step()
        assert float(ours.grad_norm) == pytest.approx(float(norm))
    for a, b in zip(weights(m), weights(other), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    m = model()
    optimizer = OptimConfig("muon").build(m, skip_nonfinite=True)
    before = weights(m)
    give_grads(m.parameters(), 0)
    m.wte.weight.grad = torch.full_like(m.wte.weight, math.inf)
    optimizer.step()
    assert same(weights(m), before)
    assert not optimizer.state
    assert float(optimizer.skipped_steps) == 1.0
    give_grads(m.parameters(), 0)
    optimizer.step()
    assert float(optimizer.skipped_steps) == 1.0
    assert not any(same([a], [b]) for a, b in zip(weights(m), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_goes_on_from_its_state(name: str, dtype: torch.dtype) -> None:
    m, config = model(dtype=dtype), OptimConfig(name)
    optimizer = config.build(m)
    give_grads(m.parameters(), 0)
    optimizer.step()
    other = copy.deepcopy(m)
    resumed = config.build(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in (1, 2):
        give_grads(m.parameters(), step)
        give_grads(other.parameters(), step)
        optimizer.step()
        resumed.step()
    assert same(weights(m), weights(other))
    assert same(*([t for s in o.state.values() for t in s.values()] for o in (optimizer, resumed)))


def test_dcp_has_one_state_of_it() -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    m = model()
    optimizer = OptimConfig("muon").build(m)
    give_grads(m.parameters(), 0)
    optimizer.step()
    m.zero_grad()
    own, state = get_state_dict(m, optimizer)
    assert set(state["state"]["h.0.mlp.c_fc.weight"]) == {"momentum_buffer"}
    assert set(state["state"]["h.0.mlp.c_fc.bias"]) == {"step", "exp_avg", "exp_avg_sq"}
    other = model()
    resumed = OptimConfig("muon").build(other)
    set_state_dict(other, resumed, model_state_dict=own, optim_state_dict=copy.deepcopy(state))
    for net, o in ((m, optimizer), (other, resumed)):
        give_grads(net.parameters(), 1)
        o.step()
    assert same(weights(m), weights(other))


def test_rejects_the_state_of_another() -> None:
    m = model()
    state = OptimConfig("adamw").build(m).state_dict()
    with pytest.raises(ValueError, match="must belong to muon, adamw, adamw; got None, None"):
        OptimConfig("muon").build(m).load_state_dict(state)


def test_a_copy_is_one_of_its_own() -> None:
    m = model()
    optimizer = OptimConfig("muon", clip=0.5).build(m)
    give_grads(m.parameters(), 0)
    optimizer.step()
    both = copy.deepcopy((m, optimizer))
    for net, o in (both, (m, optimizer)):
        give_grads(net.parameters(), 1)
        o.step()
    assert same(weights(m), weights(both[0]))


def test_a_scaler_skips_its_step() -> None:
    m = model()
    optimizer = OptimConfig("muon", clip=0.1).build(m)
    plain = model()
    other = OptimConfig("muon", clip=0.1).build(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = weights(m)
    for bad in (True, False):
        give_grads(m.parameters(), 3, scaler.get_scale())
        if bad:
            m.wte.weight.grad = torch.full_like(m.wte.weight, math.inf)
        scaler.scale(torch.zeros(()))  # makes the scale
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert same(weights(m), before)
    give_grads(plain.parameters(), 3)
    other.step()
    for a, b in zip(weights(m), weights(plain), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, LLAMA])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("embeddings", [True, False])
def test_every_parameter_is_in_one_group(config: GPTConfig, name: str, embeddings: bool) -> None:
    m = model(config)
    m.ln_f.weight.requires_grad_(False)
    optimizer = OptimConfig(name, weight_decay=0.3, decay_embeddings=embeddings).build(m)
    where = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(where)
    for path, p in m.named_parameters():
        if not p.requires_grad:
            assert id(p) not in where
            continue
        group = where[id(p)]
        table = path in ("wte.weight", "wpe.weight")
        assert group["weight_decay"] == (0.3 if p.ndim == 2 and (embeddings or not table) else 0.0)
        if name == "muon":
            hidden = p.ndim == 2 and path.startswith("h.")
            assert group["algorithm"] == ("muon" if hidden else "adamw"), path


def test_decay_groups_of_no_model_of_ours() -> None:
    net = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2), nn.LayerNorm(2))
    groups = decay_groups(net, 0.1, embeddings=False)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (4, 0.0)]


def test_it_learns_faster_than_nothing() -> None:
    losses = {}
    for name in ("muon", "adamw"):
        m = model()
        optimizer = OptimConfig(name, lr=1e-2).build(m)
        idx = torch.arange(8).repeat(4, 1)
        for _ in range(20):
            loss = m(idx, (idx + 1) % 32)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert max(losses.values()) < 1.0, losses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sgd"}, "optim: name must be one of adamw, muon; got 'sgd'"),
        ({"lr": 0.0}, "optim: lr must be positive; got 0.0"),
        ({"lr": math.nan}, "optim: lr must be positive; got nan"),
        ({"clip": -1.0}, "optim: clip must not be negative; got -1.0"),
        ({"beta2": 1.0}, r"optim: beta2 must lie in \[0, 1\); got 1.0"),
        ({"momentum": 1.0}, r"optim: momentum must lie in \[0, 1\); got 1.0"),
        ({"muon_lr": 0.1}, "optim: muon_lr is of name muon; got name adamw"),
    ],
)
def test_rejects_a_configuration(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change)


def test_rejects_what_muon_cannot_take() -> None:
    with pytest.raises(ValueError, match="2D"):
        MuonAdamW([nn.Parameter(torch.zeros(3))], [])
    with pytest.raises(ValueError, match="there must be a parameter; got none"):
        MuonAdamW([], [])
    with pytest.raises(ValueError, match="max_grad_norm must be above 0; got 0"):
        MuonAdamW([nn.Parameter(torch.zeros(3, 3))], [], max_grad_norm=0.0)
    with pytest.raises(ValueError, match="a parameter must take a gradient"):
        OptimConfig().build(model().requires_grad_(False))
