"""fastgpt.functional on PyTorch's own operator samples, against torch.nn.functional."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import settings
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import fastgpt.functional as F
from fastgpt import explain
from tests.check import run
from tests.conftest import DTYPES, SANITIZED

invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
settings.load_profile("fastgpt")  # in whose place torch puts one of its own


def embedding(of: Any) -> Callable[..., Tensor]:
    return lambda weight, idx, **kwargs: of.embedding(idx, weight, **kwargs)  # as the samples are


NAMES = (
    "layer_norm", "rms_norm", "gelu", "linear", "scaled_dot_product_attention", "cross_entropy",
    "linear_cross_entropy", "embedding", "dropout",
)  # fmt: skip
OURS = {name: getattr(F, name) for name in NAMES} | {"embedding": embedding(F)}
THEIRS = {name: getattr(TF, name, None) for name in NAMES} | {"embedding": embedding(TF)}
INFOS = [
    info for info in invocations.op_db if info.name.removeprefix("nn.functional.") in NAMES
]  # fmt: skip
# The sanitizer's questions to the kernels are their own tests': here one dtype is enough for it.
FEW = DTYPES[-1:] if SANITIZED else DTYPES
# Samples whose results a kernel may not share, and the test that has them.
ELSEWHERE = {"dropout_p": "test_attention_drops_by_its_own_seed"}


def title(info: Any) -> str:
    name: str = info.name.removeprefix("nn.functional.")
    return f"{name}-{info.variant_test_name}" if info.variant_test_name else name


def test_every_function_has_samples() -> None:
    have = {info.name.removeprefix("nn.functional.") for info in INFOS}
    missing = set(NAMES) - have
    assert missing <= {n for n in NAMES if not hasattr(TF, n)}, missing


def split(sample: Any, f: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """f as a function of the tensors of a sample that require a gradient, and those."""
    flat, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
    places = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]
    leaves = {f"x{i}": flat[i].detach() for i in places}

    def call(**given: Tensor) -> Tensor:
        dtype = next(iter(given.values())).dtype
        now = [
            t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in flat
        ]  # fmt: skip
        for i in places:
            now[i] = given[f"x{i}"]
        args, kwargs = tree_unflatten(now, spec)
        if dtype == torch.float64:
            kwargs.pop("options", None)  # of accumulation: it takes 16 bits alone
        torch.manual_seed(0)
        return f(*args, **kwargs)

    return call, leaves


def assert_agrees(ours: Any, theirs: Any, leaves: dict[str, Tensor], said: str) -> None:
    """Value and gradients by the tolerance law; NaN where torch has NaN.

    The samples are so small that the worst rounding among them is a matter of luck: one more, of
    the greatest element, is allowed.
    """
    y = theirs(**leaves)
    dy = torch.randn_like(y)
    got, same = run(ours, leaves, dy), run(theirs, leaves, dy)
    gold = run(theirs, leaves, dy, torch.float64)
    for name, truth in gold.items():
        g, s = got[name], same[name]
        assert g.dtype == s.dtype and g.shape == s.shape, (said, name, g.dtype, s.dtype)
        assert torch.equal(g.isnan(), s.isnan()), (said, name)
        off, theirs_off = (
            (t.double() - truth).abs().nan_to_num(0.0, 0.0, 0.0).max().item() if t.numel() else 0.0
            for t in (g, s)
        )
        most = truth.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if truth.numel() else 0.0
        allowed = 2 * theirs_off + 1e-5 + torch.finfo(g.dtype).eps / 2 * most
        assert off <= allowed, f"{name} off by {off:.2e}, allowed {allowed:.2e}: {said}"


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("info", INFOS, ids=title)
def test_samples(info: Any, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    name = info.name.removeprefix("nn.functional.")
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        ours, leaves = split(sample, OURS[name])
        theirs, _ = split(sample, THEIRS[name])
        assert_agrees(ours, theirs, leaves, str(sample))
        count += 1
    with capsys.disabled():
        print(
            f"\n{title(info)}, {dtype}: {count} samples of PyTorch's agree, none skipped", end=" "
        )
    assert count


@pytest.mark.parametrize("info", [i for i in INFOS if i.error_inputs_func], ids=title)
def test_errors_are_torchs(info: Any) -> None:
    name = info.name.removeprefix("nn.functional.")
    count = 0
    for error in info.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            OURS[name](sample.input, *sample.args, **sample.kwargs)
        count += 1
    assert count


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FEW, ids=str)
@pytest.mark.parametrize(
    "info",
    [i for i in INFOS if title(i) in (
        "layer_norm", "rms_norm", "scaled_dot_product_attention", "cross_entropy",
        "linear_cross_entropy", "embedding",
    )],
    ids=title,
)  # fmt: skip
def test_samples_through_the_kernels(
    info: Any, dtype: torch.dtype, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = info.name.removeprefix("nn.functional.")
    paths: Counter[str] = Counter()
    # What neither dtype nor device changes for a kernel: every second of the many is enough.
    samples = list(info.sample_inputs(device, dtype, requires_grad=True))
    for sample in samples[:: 1 + len(samples) // 50]:
        if sample.kwargs.get("dropout_p", 0.0) > 0.0:
            paths[f"in {ELSEWHERE['dropout_p']}"] += 1
            continue
        ours, leaves = split(sample, OURS[name])
        theirs, _ = split(sample, THEIRS[name])
        if name == "scaled_dot_product_attention":
            # As they are, one weight is 1 and the scores' gradient a difference of equals: of the
            # output's rounding, in any flash attention.
            leaves = {n: t / 8 for n, t in leaves.items()}
        if name == "layer_norm" and sample.args[0] == (1,):
            # A GPU multiplies and subtracts in one rounding: of a row of one, where the gradient is
            # a difference of equals over sqrt(eps), that rounding is all there is.
            leaves = {n: t / 8 for n, t in leaves.items()}
        choice = explain(ours, **leaves)[-1]
        paths["through the kernel" if choice.path == "triton" else choice.why] += 1
        assert_agrees(ours, theirs, leaves, str(sample))
    with capsys.disabled():
        said = "; ".join(f"{n} {why}" for why, n in paths.items())
        print(f"\n{title(info)}, {dtype}: samples {said}", end=" ")
    assert paths["through the kernel"]
