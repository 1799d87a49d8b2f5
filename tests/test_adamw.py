"""adamw and fastgpt.optim.AdamW: specification, torch's optimizer, kernels, op, errors."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastgpt
from fastgpt.ops import backend
from fastgpt.ops.adamw import AdamWGroup, adamw, adamw_ref, stochastic_bfloat16
from fastgpt.ops.backend import INTERPRET
from fastgpt.optim import AdamW
from tests.conftest import DTYPES

# Wide accesses, narrow ones, several blocks and chunks of the interpreter's, one, none.
SHAPES = [(5, 7), (16, 16), (3,), (0,), (), (129,), (64,)]


def parameters(
    device: str = "cpu", dtype: torch.dtype = torch.float32, shapes: Any = None
) -> list[nn.Parameter]:
    torch.manual_seed(1)
    shapes = SHAPES if shapes is None else shapes
    return [nn.Parameter(torch.randn(s, device=device).to(dtype)) for s in shapes]


def run(optimizer: torch.optim.Optimizer, steps: int = 3, scale: float = 1.0) -> None:
    """Steps on gradients that are the same in every run."""
    torch.manual_seed(2)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in params:
            p.grad = (torch.randn(p.shape) * scale).to(p.dtype).to(p.device)
        optimizer.step()


def in_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.0, "lr": 3e-3}]


def close(got: list[Any], want: list[Any], atol: float = 2e-7) -> None:
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g.double(), w.double(), atol=atol, rtol=1e-6), (g, w)


def forced(*args: Any, **kwargs: Any) -> None:
    with fastgpt.use("triton"):
        adamw(*args, **kwargs)


# ------------------------------------------------------------------ the specification


def test_reference_is_torchs_adamw() -> None:
    p = nn.Parameter(torch.randn(9, dtype=torch.float64))
    now, m, v = p.detach().clone(), torch.zeros(9).double(), torch.zeros(9).double()
    theirs = torch.optim.AdamW([p], lr=1e-2, betas=(0.8, 0.95), weight_decay=0.3)
    for t in range(1, 4):
        p.grad = torch.randn(9, dtype=torch.float64)
        theirs.step()
        now, m, v = adamw_ref(
            now, p.grad, m, v, torch.tensor(float(t)), 1e-2, (0.8, 0.95), weight_decay=0.3
        )
    assert torch.allclose(now, p, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_optimizer_is_torchs(max_norm: float | None, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    with fastgpt.use("reference"):
        run(AdamW(in_groups(ours), lr=1e-2, max_grad_norm=max_norm))
    optimizer = torch.optim.AdamW(in_groups(theirs), lr=1e-2)
    if max_norm is not None:
        optimizer.register_step_pre_hook(
            lambda *_: torch.nn.utils.clip_grad_norm_(theirs, max_norm) and None
        )
    run(optimizer)
    close(ours, theirs)


def test_stochastic_rounding_is_right_on_average_and_leaves_what_is_exact() -> None:
    x = torch.full((40_000,), 1.0 + 0.25 * 2**-7)  # a quarter of the way to the next
    y = stochastic_bfloat16(x, torch.tensor([3]), 0, torch.tensor(1.0)).float()
    assert set(y.tolist()) == {1.0, 1.0 + 2**-7}
    assert abs((y > 1).float().mean().item() - 0.25) < 0.01
    other = stochastic_bfloat16(x, torch.tensor([3]), 0, torch.tensor(2.0)).float()
    assert 0.3 < (y != other).float().mean() < 0.45  # of independent draws 0.375 differ
    exact = torch.tensor([1.0, -2.5, 0.0, float("inf"), float("-inf")])
    assert torch.equal(stochastic_bfloat16(exact, torch.tensor([3]), 0, torch.tensor(1.0)).float(),
                       exact)  # fmt: skip


# ------------------------------------------------------------------ the kernels


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_errs_no_more_than_twice_torch(dtype: torch.dtype, device: str) -> None:
    ours, theirs = parameters(device, dtype), parameters(device, dtype)
    gold = [nn.Parameter(p.detach().double()) for p in theirs]
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    with fastgpt.use("auto" if INTERPRET and dtype == torch.bfloat16 else "triton"):
        optimizer = AdamW(in_groups(ours), **options)
        run(optimizer)
    run(torch.optim.AdamW(in_groups(gold), **options, foreach=False))
    with fastgpt.use("reference"):
        run(AdamW(in_groups(theirs), **options))
    for p, q, truth in zip(ours, theirs, gold, strict=True):
        if p.numel():
            err, allowed = ((t.double() - truth).abs().max() for t in (p, q))
            assert err <= 2 * allowed + (1e-6 if dtype == torch.float32 else 1e-3)
            state = optimizer.state[p]
            assert state["step"] == 3 and state["exp_avg"].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_kernel_clips_by_the_global_norm(factor: float, device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    with fastgpt.use("triton"):
        optimizer = AdamW(in_groups(ours), lr=1e-2, max_grad_norm=1.0)
        run(optimizer, 2, factor)
    with fastgpt.use("reference"):
        reference = AdamW(in_groups(theirs), lr=1e-2, max_grad_norm=1.0)
        run(reference, 2, factor)
    close(ours, theirs)
    assert torch.allclose(optimizer.grad_norm, reference.grad_norm, rtol=1e-6)
    assert torch.allclose(optimizer._made_control(), reference._made_control(), rtol=1e-6)
    grads = torch.cat([p.grad.flatten() for p in ours if p.grad is not None])
    assert torch.allclose(grads.norm(), optimizer.grad_norm, rtol=1e-5)  # left as they were


@pytest.mark.gpu
def test_copies_are_written_in_the_same_pass_and_lend_their_gradients(device: str) -> None:
    half = DTYPES[-1]
    ours = parameters(device, shapes=[(16, 16), (9,)])
    copies = {p: nn.Parameter(torch.zeros_like(p, dtype=half)) for p in ours}
    with fastgpt.use("triton"):
        optimizer = AdamW(ours, lr=1e-2, copies=copies)
        for p in ours:
            copies[p].grad = torch.ones_like(copies[p])
        optimizer.step()
    for p in ours:
        assert torch.equal(copies[p], p.to(half)) and optimizer.state[p]["step"] == 1
    optimizer.zero_grad()
    assert all(c.grad is None for c in copies.values())


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad: float, device: str) -> None:
    params = parameters(device, shapes=[(16, 4), (5,)])
    with fastgpt.use("triton"):
        optimizer = AdamW(params, max_grad_norm=1.0, skip_nonfinite=True)
        run(optimizer, 1)
        before = copy.deepcopy([[p, *optimizer.state[p].values()] for p in params])
        for p in params:
            assert p.grad is not None
            p.grad[0] = bad
        optimizer.step()
        after = [[p, *optimizer.state[p].values()] for p in params]
        for old, new in zip(before, after, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
        assert optimizer.skipped_steps == 1 and not optimizer.grad_norm.isfinite()
        run(optimizer, 1)
    assert optimizer.skipped_steps == 1 and optimizer.state[params[0]]["step"] == 2


@pytest.mark.gpu
def test_without_skipping_nan_stays_where_the_gradient_has_it(device: str) -> None:
    params = parameters(device, shapes=[(16, 4), (5,)])
    with fastgpt.use("triton"):
        optimizer = AdamW(params)
        for p in params:
            p.grad = torch.ones_like(p)
        assert params[0].grad is not None
        params[0].grad[3, 1] = float("nan")
        optimizer.step()
    assert params[0].isnan().sum() == 1 and params[0][3, 1].isnan() and params[1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRET, reason="the interpreter has no bfloat16")
def test_kernel_rounds_as_the_reference_does(device: str) -> None:
    ours = parameters(device, torch.bfloat16, [(37,), (16, 16)])
    theirs = parameters(device, torch.bfloat16, [(37,), (16, 16)])
    options: dict[str, Any] = {"lr": 1e-3, "stochastic_rounding": True, "seed": 2**40 + 3}
    with fastgpt.use("triton"):
        run(AdamW(ours, **options))
    with fastgpt.use("reference"):
        run(AdamW(theirs, **options))
    for p, q in zip(ours, theirs, strict=True):  # a float32 ulp may move a number over a bit
        assert (p != q).float().mean() < 0.02 and torch.allclose(p, q, rtol=2**-6)


@pytest.mark.gpu
def test_the_same_bits_twice(device: str) -> None:
    def once() -> list[nn.Parameter]:
        params = parameters(device)
        with fastgpt.use("triton"):
            run(AdamW(params, max_grad_norm=1.0), 2)
        return params

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.gpu
def test_layouts_other_than_contiguous(device: str) -> None:
    """A transposed parameter, a gradient laid out otherwise, expanded, or of another dtype."""
    base = torch.randn(8, 6, device=device)
    ours = nn.Parameter(base.t().clone(memory_format=torch.preserve_format))
    theirs = nn.Parameter(base.t().contiguous())
    grads = [
        torch.randn(6, 8, device=device),
        torch.randn(6, 1, device=device).expand(6, 8),
        torch.randn(6, 16, device=device)[:, ::2],
    ]
    with fastgpt.use("triton"):
        optimizer = AdamW([ours], lr=1e-2)
        for g in grads:
            ours.grad = g
            optimizer.step()
    reference = torch.optim.AdamW([theirs], lr=1e-2)
    for g in grads:
        theirs.grad = g.contiguous()
        reference.step()
    assert ours.stride() == (1, 6)
    close([ours], [theirs])


@pytest.mark.gpu
def test_the_learning_rate_may_be_a_tensor_and_a_gradient_may_be_scaled(device: str) -> None:
    ours, theirs = parameters(device, shapes=[(33,)]), parameters(device, shapes=[(33,)])
    lr = torch.tensor(1e-2, device=device)
    with fastgpt.use("triton"):
        optimizer: Any = AdamW(ours, lr)
        optimizer.grad_scale = torch.tensor(4.0, device=device)  # as GradScaler sets them
        optimizer.found_inf = torch.tensor(0.0, device=device)
        run(optimizer, 1, 4.0)
        lr.fill_(1e-3)
        run(optimizer, 1, 4.0)
        optimizer.found_inf.fill_(1.0)
        run(optimizer, 1, 4.0)
    reference = torch.optim.AdamW(theirs, 1e-2)
    run(reference, 1)
    reference.param_groups[0]["lr"] = 1e-3
    run(reference, 1)
    close(ours, theirs)
    assert optimizer.state[ours[0]]["step"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("steps, beta", [(1, 0.999), (1, 0.0), (400, 0.999), (10**6, 0.9)])
def test_bias_correction_is_exact_early_and_late(steps: int, beta: float, device: str) -> None:
    p = torch.zeros(16, device=device)
    group = AdamWGroup(
        [p], [torch.zeros_like(p)], [torch.ones_like(p)], [torch.ones_like(p)],
        [torch.tensor(steps - 1.0, device=device)], lr=1.0, betas=(beta, beta), eps=0.0,
    )  # fmt: skip
    forced([group], torch.zeros(4, device=device))
    if beta:
        want = -((1 - beta**steps) ** -0.5) * beta**0.5
        assert torch.allclose(p, torch.full_like(p, want), rtol=1e-6)
    assert group.steps[0] == steps


@pytest.mark.gpu
def test_parameters_without_gradient_are_left_and_counted_apart(device: str) -> None:
    params = parameters(device, shapes=[(16,), (5,)])
    with fastgpt.use("triton"):
        optimizer = AdamW(params)
        before = params[1].detach().clone()
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        assert torch.equal(params[1], before) and params[1] not in optimizer.state
        params[1].grad = torch.ones_like(params[1])
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2.0, 1.0]


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRET, reason="wants memory that is set aside and never touched")
def test_tensors_further_apart_than_32_bits(device: str) -> None:
    room = torch.from_numpy(np.zeros(2**31 + 2**12, np.float16))  # only touched pages are real
    far = [room[:40], room[2**31 + 64 : 2**31 + 104]]
    near = [torch.randn(40).half() for _ in far]
    for a, b in zip(far, near, strict=True):
        a.copy_(b)

    def step(params: list[Tensor]) -> None:
        g, m, v = ([torch.ones(40) for _ in params] for _ in range(3))
        steps = [torch.zeros(()) for _ in params]
        forced([AdamWGroup(params, g, m, v, steps)], torch.zeros(4))

    step(far)
    step(near)
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


@pytest.mark.gpu
def test_launches_are_few(device: str) -> None:
    from tests.conftest import launched

    params = parameters(device, shapes=[(16,)] * 9)
    optimizer = AdamW(in_groups(params), max_grad_norm=1.0)
    before = launched.copy()
    with fastgpt.use("triton"):
        run(optimizer, 1)
    assert (launched - before).total() == 3


# ------------------------------------------------------------------ state


def test_state_goes_from_torch_and_back() -> None:
    a, b = parameters(), parameters()
    theirs = torch.optim.AdamW(in_groups(a), lr=1e-2)
    run(theirs)
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    ours = AdamW(in_groups(b))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    run(theirs)
    run(ours)
    close(b, a)
    back = torch.optim.AdamW(in_groups(parameters()))
    back.load_state_dict(ours.state_dict())
    for p, q in zip(b, [p for g in back.param_groups for p in g["params"]], strict=True):
        assert back.state[q].keys() == ours.state[p].keys()
        assert all(torch.equal(back.state[q][k], v) for k, v in ours.state[p].items())


def test_moments_of_16_bit_parameters_stay_float32_through_state_and_copy() -> None:
    params = parameters(dtype=torch.bfloat16, shapes=[(5,)])
    optimizer = AdamW(params, max_grad_norm=1.0, skip_nonfinite=True)
    run(optimizer)
    other = AdamW(parameters(dtype=torch.bfloat16, shapes=[(5,)]))
    other.load_state_dict(optimizer.state_dict())
    (want,), (got,) = optimizer.state.values(), other.state.values()
    assert got["exp_avg"].dtype == torch.float32
    assert all(torch.equal(got[k], want[k]) for k in want)
    twin = copy.deepcopy(optimizer)
    assert twin.max_grad_norm == 1.0 and torch.equal(twin.grad_norm, optimizer.grad_norm)


def test_schedulers_and_closures() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5 and (p < 1).all()


def test_grad_scaler_skips_what_overflowed() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert (p == 1).all() and scaler.get_scale() == 4.0
    optimizer.zero_grad()
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    assert (p < 1).all()


# ------------------------------------------------------------------ the registered op


@pytest.mark.parametrize("low", [False, True])
def test_opcheck(low: bool) -> None:
    p = [torch.randn(4, 4), torch.randn(3)]

    def like() -> list[Tensor]:
        return [torch.rand_like(t) for t in p]

    args: Any = (
        p, like(), like(), like(), [torch.ones(()) for _ in p],
        [t.bfloat16() for t in p] if low else [], [], [1e-3, 0.9, 0.99, 1e-8, 0.1], [0, 0],
        torch.zeros(4), None, None, 1.0, True, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastgpt.adamw_, args)


def compiled_step_is_the_eager_one(path: str) -> None:
    ours, theirs = (parameters(shapes=[(5, 7), (16,)]) for _ in range(2))
    for params, compiled in ((ours, True), (theirs, False)):
        optimizer = AdamW(params, lr=1e-2, max_grad_norm=1.0)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        torch.manual_seed(2)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            with fastgpt.use(path):
                step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_compiled_step_is_the_eager_one() -> None:
    compiled_step_is_the_eager_one("reference")


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRET, reason="Dynamo cannot trace the stand-in of the sanitizer")
def test_compiled_step_launches_the_kernel(device: str) -> None:
    compiled_step_is_the_eager_one("triton")


@pytest.mark.gpu
def test_op_is_its_cpu_implementation(device: str) -> None:
    """The op's implementation without a kernel, which opcheck sees, agrees with the kernel."""
    made = []
    for launches in (True, False):
        torch.manual_seed(3)
        p = [torch.randn(16, 4, device=device), torch.randn(7, device=device)]
        args: Any = (
            p, [torch.randn_like(t) for t in p], [torch.zeros_like(t) for t in p],
            [torch.zeros_like(t) for t in p], [torch.zeros((), device=device) for _ in p], [], [],
            [1e-2, 0.9, 0.99, 1e-8, 0.1, 1e-3, 0.8, 0.9, 1e-6, 0.0], [0, 1],
            torch.zeros(4, device=device), None, None, 1.0, True, None,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            if not launches:
                patch.setattr(backend, "runs_kernel", lambda x: False)
            torch.ops.fastgpt.adamw_(*args)
        made.append([*p, *args[2], *args[3], *args[4], args[9]])
    close(*made)


# ------------------------------------------------------------------ bad input


def test_rejects() -> None:
    def group(**changes: Any) -> AdamWGroup:
        made: dict[str, Any] = {
            name: [torch.zeros(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")
        }
        return AdamWGroup(**made | {"steps": [torch.zeros(())]} | changes)

    control = torch.zeros(4)
    for changes, kwargs, rule in [
        ({"grads": []}, {}, "one of grads for each of params; got 0 for 1"),
        ({"grads": [torch.zeros(4)]}, {}, r"grads must be \(3,\), as params; got \(4,\)"),
        ({"steps": [torch.zeros(3)]}, {}, r"steps must be \(\), one number; got \(3,\)"),
        ({"grads": [torch.zeros(3, device="meta")]}, {}, "on one device; got params cpu, grads"),
        ({"grads": [torch.zeros(3).to_sparse()]}, {}, "grads must be dense tensors; got"),
        ({"betas": (0.9, 1.0)}, {}, r"betas must lie in \[0, 1\); got 1.0"),
        ({"lr": -1.0}, {}, "lr must be at least 0; got -1.0"),
        ({"lr": torch.zeros(2)}, {}, r"lr must be one number; got shape \(2,\)"),
        ({}, {"max_grad_norm": 0.0}, "max_grad_norm must be above 0; got 0.0"),
        ({}, {"seed": torch.zeros(1)}, "seed must be one int64; got torch.float32"),
    ]:
        with pytest.raises(ValueError, match=f"adamw: .*{rule}"):
            adamw([group(**changes)], control, **kwargs)
    with pytest.raises(ValueError, match="control must be 4 of float32"):
        adamw([group()], torch.zeros(3))
    with pytest.raises(ValueError, match="low must be given for all groups or for none"):
        adamw([group(), group(low=[torch.zeros(3)])], control)
    with pytest.raises(TypeError, match=r"floating dtype; got params torch\.float32, grads"):
        adamw([group(grads=[torch.zeros(3).long()])], control)
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="AdamW: max_grad_norm must be above 0; got -1"):
        AdamW([p], max_grad_norm=-1)
    with pytest.raises(ValueError, match="copies must have one for each parameter; got none for 1"):
        AdamW([p], copies={torch.zeros(3): p})
    with pytest.raises(ValueError, match="a group with maximize is not supported"):
        AdamW([{"params": [p], "maximize": True}])
    with pytest.raises(ValueError, match="a state with amsgrad cannot be loaded"):
        AdamW([p]).load_state_dict(torch.optim.AdamW([p], amsgrad=True).state_dict())
