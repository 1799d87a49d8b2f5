"""What PyTorch's samples of torch.nn.functional leave out; the hook in torch's own attention."""

import inspect
import logging
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt.functional as F
from fastgpt import explain, use
from fastgpt.functional import hook
from fastgpt.ops.dropout import draw_seed, dropout_mask
from tests.check import assert_matches, assert_one_graph
from tests.conftest import DTYPES, HAS_CUDA, SANITIZED

NAMES = (
    "layer_norm", "rms_norm", "gelu", "linear", "scaled_dot_product_attention", "cross_entropy",
    "linear_cross_entropy", "embedding", "dropout",
)  # fmt: skip
# The sanitizer's questions to the kernels are their own tests': here one dtype is enough for it.
FEW = DTYPES[-1:] if SANITIZED else DTYPES


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torchs(name: str) -> None:
    theirs = getattr(TF, name, None)
    if theirs is None:
        pytest.skip(f"torch {torch.__version__} has no {name}")
    ours = inspect.signature(getattr(F, name))
    if inspect.isfunction(theirs):
        want = inspect.signature(theirs).parameters
        assert list(ours.parameters) == list(want)
        for key, p in ours.parameters.items():
            assert (p.default, p.kind) == (want[key].default, want[key].kind), key
    else:  # a builtin says it in words
        said = (theirs.__doc__ or "").split("->")[0].replace(" ", "").replace("'", "")
        for key, p in ours.parameters.items():
            assert key in said
            if p.default is not p.empty and p.default is not None:
                assert f"{key}={p.default}" in said, key


def attend(**kwargs: Any) -> Any:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **kwargs)


def attend_torch(**kwargs: Any) -> Any:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = dict(kwargs)
        mask = given.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            full = *torch.broadcast_shapes(mask.shape[:-2], q.shape[:-2]), q.shape[-2], k.shape[-2]
            given["attn_mask"] = mask.to(q.dtype).expand(full).contiguous()  # which CUDA wants
        return TF.scaled_dot_product_attention(q, k, v, **given)

    return f


def once(dtype: torch.dtype) -> float:
    """One rounding of a 2: of so few elements the worst rounding is a matter of luck."""
    return max(1e-5, torch.finfo(dtype).eps)


LONG, WIDE = (2, 3, 19, 16), (2, 3, 37, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FEW, ids=str)
@pytest.mark.parametrize(
    "q, kv, kwargs",
    [
        (LONG, LONG, {"is_causal": True}),
        (LONG, WIDE, {"is_causal": True}),  # torch counts from the first key
        (WIDE, LONG, {"is_causal": True}),
        (LONG, WIDE, {"scale": 0.1}),
        ((2, 4, 9, 16), (2, 2, 9, 16), {"is_causal": True, "enable_gqa": True}),
        ((9, 16), (11, 16), {}),
        ((4, 9, 16), (2, 11, 16), {"enable_gqa": True}),
        ((2, 3, 2, 9, 16), (2, 3, 2, 11, 16), {}),
        (LONG, WIDE, {"mask": (19, 37), "bool": True}),
        (LONG, WIDE, {"mask": (2, 1, 1, 37), "bool": True}),
        (LONG, WIDE, {"mask": (3, 1, 1)}),
        (LONG, WIDE, {"mask": (2, 3, 19, 37)}),
        ((2, 2, 3, 9, 16), (2, 2, 3, 11, 16), {"mask": (9, 11)}),
    ],
    ids=str,
)
def test_attention_takes_what_torchs_takes(
    q: tuple[int, ...], kv: tuple[int, ...], kwargs: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    kwargs = dict(kwargs)
    if shape := kwargs.pop("mask", None):
        mask = torch.randn(shape, device=device)
        if kwargs.pop("bool", False):
            mask = mask > 0.3
            mask[..., 0] = True
        kwargs["attn_mask"] = mask if mask.dtype == torch.bool else mask.to(dtype)
    inputs = {
        name: torch.randn(shape, device=device, dtype=dtype)
        for name, shape in (("q", q), ("k", kv), ("v", kv))
    }
    with use("triton"):
        F.scaled_dot_product_attention(*inputs.values(), **kwargs)
    assert_matches(attend(**kwargs), attend_torch(**kwargs), inputs, atol=once(dtype))


@pytest.mark.gpu
def test_attention_gives_a_mask_its_gradient(device: str) -> None:
    inputs = {"q": torch.randn(LONG), "k": torch.randn(WIDE), "v": torch.randn(WIDE)}
    inputs = {k: v.to(device) for k, v in inputs.items()}
    inputs["attn_mask"] = torch.randn(3, 19, 37, device=device)
    assert_matches(
        lambda q, k, v, attn_mask: F.scaled_dot_product_attention(q, k, v, attn_mask),
        lambda q, k, v, attn_mask: TF.scaled_dot_product_attention(q, k, v, attn_mask),
        inputs,
    )


@pytest.mark.gpu
def test_attention_drops_by_its_own_seed(device: str) -> None:
    q, k, v = (torch.randn(2, 3, 21, 16, device=device) for _ in range(3))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(7)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)

    torch.manual_seed(7)
    keep = dropout_mask(draw_seed(q.device), (2, 3, 21, 21), 0.3)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = (q @ k.mT / 4.0).softmax(-1)
        return (w * keep / 0.7) @ v

    assert_matches(ours, formula, {"q": q, "k": k, "v": v})


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call, why",
    [
        (lambda x: F.scaled_dot_product_attention(x, x, x[..., :8]), "k and v of one shape"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, scale=-1.0), "positive softmax_scale"),
        (lambda x: F.scaled_dot_product_attention(*[x[..., :12]] * 3), "multiple of 8"),
        (lambda x: F.embedding(torch.tensor([1], device=x.device), x[0, 0], 0), "no padding_idx"),
        (lambda x: F.cross_entropy(x[0, 0], x[0, 0].softmax(-1)), "no probabilities"),
        (lambda x: F.gelu(x), "ops.ffn has it in its product"),
        (lambda x: F.linear(x, x[0, 0]), "a product by itself is the vendor's"),
        (lambda x: F.dropout(x), "no kernel of its own"),
        (lambda x: F.layer_norm(x, (16,), x[0, 0, 0].double()), "a mix of dtypes"),
    ],
)
def test_explain_says_why_the_reference_ran(call: Any, why: str, device: str) -> None:
    x = torch.randn(1, 2, 5, 16, device=device)
    assert explain(lambda: F.layer_norm(x, (16,)))[-1].path == "triton"

    def quiet() -> None:
        with suppress(RuntimeError):  # what torch refuses too, on some device
            call(x)

    choices = explain(quiet)
    assert choices[-1].path == "reference" and why in choices[-1].why, choices


def test_a_subclass_that_overrides_torch_is_asked() -> None:
    class Loud(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return f"heard {func.__name__}"

    x = torch.randn(2, 8).as_subclass(Loud)
    assert F.layer_norm(x, (8,)) == "heard layer_norm"  # type: ignore[comparison-overlap]
    assert F.scaled_dot_product_attention(x, x, x) == "heard scaled_dot_product_attention"  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    "name, args, kwargs",
    [
        ("layer_norm", (torch.randn(2, 8), (7,)), {}),
        ("layer_norm", (torch.randn(2, 8), 8), {}),
        ("layer_norm", (None, (8,)), {}),
        ("rms_norm", (torch.randn(2, 8), (8,), torch.randn(4)), {}),
        ("embedding", (torch.tensor([9]), torch.randn(5, 3)), {}),
        ("embedding", (torch.tensor([1.0]), torch.randn(5, 3)), {}),
        ("embedding", (torch.tensor([1]), torch.randn(5, 3), 9), {}),
        ("cross_entropy", (torch.randn(2, 3), torch.tensor([0, 3])), {}),
        ("cross_entropy", (torch.randn(2, 3), torch.tensor([0, 1, 2])), {}),
        ("cross_entropy", (torch.randn(2, 3), torch.tensor([0, 1])), {"reduction": "all"}),
        ("cross_entropy", (torch.randn(2, 3), torch.tensor([0, 1])), {"label_smoothing": 2.0}),
        ("linear_cross_entropy", (torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 3])), {}),
        ("linear_cross_entropy", (torch.randn(2, 4), torch.randn(3, 5), torch.tensor([0, 1])), {}),
        ("scaled_dot_product_attention", (torch.randn(4, 8), torch.randn(4, 7), torch.randn(4, 8)),
         {}),
        ("scaled_dot_product_attention", (torch.randn(1, 4, 8),) * 3,
         {"attn_mask": torch.ones(4, 4, dtype=torch.bool), "is_causal": True}),
        ("scaled_dot_product_attention", (torch.randn(4, 8), torch.randn(4, 8).double(),
                                          torch.randn(4, 8)), {}),
        ("dropout", (torch.randn(3), 1.5), {}),
        ("gelu", (torch.randn(3),), {"approximate": "no"}),
        ("linear", (torch.randn(2, 3), torch.randn(4, 5)), {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_bad_input_is_refused_in_torchs_words(
    name: str, args: Any, kwargs: dict[str, Any], path: str
) -> None:
    theirs = getattr(TF, name, None)
    if theirs is None:
        pytest.skip(f"torch {torch.__version__} has no {name}")
    with pytest.raises(Exception) as want:
        theirs(*args, **kwargs)
    with use(path), pytest.raises(type(want.value)) as got:
        getattr(F, name)(*args, **kwargs)
    assert str(got.value) == str(want.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (7, 5, 3)])
def test_linear_cross_entropy_of_a_torch_without_one(
    shape: tuple[int, ...], reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchs = getattr(TF, "linear_cross_entropy", None)
    if torchs is None:
        pytest.skip(f"torch {torch.__version__} has none to compare with")
    out = shape[1:2] + shape[:1] + shape[2:] if len(shape) > 1 else shape
    x = torch.randn(*shape[:1], 4) if len(shape) > 1 else torch.randn(4)
    weight, bias = torch.randn(*out[:1], *shape[2:], 4), torch.randn(*out[:1], *shape[2:])
    target = torch.randint(0, out[0], (shape[0], *shape[2:]) if len(shape) > 1 else ())
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    kwargs = {
        "linear_bias": bias, "weight": torch.rand(out[0]).to(dtype), "reduction": reduction,
        "ignore_index": 1, "label_smoothing": 0.1, "options": None,
    }  # fmt: skip
    want = torchs(x, weight, target, **kwargs)
    monkeypatch.delattr(TF, "linear_cross_entropy")
    torch.testing.assert_close(F.linear_cross_entropy(x, weight, target, **kwargs), want)
    with pytest.raises(NotImplementedError, match=r"^linear_cross_entropy: options need torch"):
        F.linear_cross_entropy(x, weight, target, **(kwargs | {"options": 1}))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA or SANITIZED, reason="autocast of a GPU needs one")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_gives_torchs_dtypes(dtype: torch.dtype) -> None:
    x, w = torch.randn(8, 16, device="cuda"), torch.randn(16, device="cuda")
    q, target = torch.randn(1, 2, 8, 16, device="cuda"), torch.arange(8, device="cuda")
    table = torch.randn(32, 16, device="cuda")
    for now in (x, x.to(dtype)):
        with torch.autocast("cuda", dtype):
            for call in (
                lambda f, t: f.layer_norm(t, (16,), w, w), lambda f, t: f.rms_norm(t, (16,), w),
                lambda f, t: f.cross_entropy(t, target), lambda f, t: f.embedding(target, table),
                lambda f, t: f.scaled_dot_product_attention(q, q, q),
            ):  # fmt: skip
                got, want = call(F, now), call(TF, now)
                assert got.dtype == want.dtype
                torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


HAS_REGISTRY = hasattr(torch.nn.attention, "register_flash_attention_impl")
needs_registry = pytest.mark.skipif(not HAS_REGISTRY, reason="this torch has no registry")


class Foreign(nn.Module):
    """A model that calls torch's own attention."""

    def __init__(self, causal: bool, p: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.causal, self.p = nn.Linear(32, 96), causal, p

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        o = TF.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=self.causal)
        return o.transpose(1, 2).flatten(2)


@needs_registry
def test_the_hook_is_put_in_and_taken_out(caplog: pytest.LogCaptureFixture) -> None:
    from torch.nn import attention

    before, cudnn = (
        attention.current_flash_attention_impl(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    with caplog.at_level(logging.WARNING):
        with F.register_sdpa():
            assert attention.current_flash_attention_impl() == "fastgpt"
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            again = F.register_sdpa()
            again.remove()
            assert attention.current_flash_attention_impl() == "fastgpt"
        assert attention.current_flash_attention_impl() == before
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
        one = F.register_sdpa()
        attention.restore_flash_attention_impl()
        one.remove()  # somebody else did already
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    assert not caplog.records
    x = torch.randn(2, 5, 32)
    with F.register_sdpa():
        assert Foreign(True)(x).shape == (2, 5, 32)  # a CPU's attention is none of a GPU's


def test_a_torch_without_the_registry_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(NotImplementedError, match=r"^register_sdpa: needs torch\.nn\.attention\."):
        F.register_sdpa()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [d for d in FEW if d != torch.float32], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["time first", "heads first"])
def test_the_hooks_functions_are_flash_attention(
    dtype: torch.dtype, causal: bool, layout: str, device: str
) -> None:
    """Through torch's dispatcher and its formula of the gradient, wherever the tensors are."""
    kernels = hook.Kernels("CUDA" if HAS_CUDA and not SANITIZED else "CPU")
    try:
        op = torch.ops.aten._scaled_dot_product_flash_attention
        q, k, v = (torch.randn(2, 21, 3, 16, device=device, dtype=dtype) for _ in range(3))
        inputs = {"q": q, "k": k, "v": v}
        if layout == "heads first":
            inputs = {n: t.transpose(1, 2).contiguous() for n, t in inputs.items()}
        else:
            inputs = {n: t.transpose(1, 2) for n, t in inputs.items()}

        def hooked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = op(q, k, v, 0.0, causal, scale=0.2)[0]
            assert out.stride() == torch.empty_like(q).stride()
            return out

        plain = attend_torch(is_causal=causal, scale=0.2)
        with sdpa_kernel(SDPBackend.MATH):
            assert_matches(hooked, plain, inputs, atol=once(dtype))
    finally:
        kernels.remove()


@pytest.mark.gpu
def test_the_hook_drops_the_same_in_both_directions(device: str) -> None:
    kernels = hook.Kernels("CUDA" if HAS_CUDA and not SANITIZED else "CPU")
    try:
        op = torch.ops.aten._scaled_dot_product_flash_attention
        inputs = {n: torch.randn(1, 2, 21, 16, device=device) for n in "qkv"}

        def hooked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            torch.manual_seed(7)
            out: Tensor = op(q, k, v, 0.3, False)[0]
            return out

        torch.manual_seed(7)
        keep = dropout_mask(draw_seed(torch.device(device)), (1, 2, 21, 21), 0.3)
        assert_matches(
            hooked, lambda q, k, v: ((q @ k.mT / 4).softmax(-1) * keep / 0.7) @ v, inputs
        )
    finally:
        kernels.remove()


@pytest.mark.gpu
@needs_registry
@pytest.mark.skipif(not HAS_CUDA or SANITIZED, reason="torch asks the hook on a GPU only")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_foreign_model_runs_on_the_kernel(dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(0)
    model = Foreign(True).to("cuda", dtype)
    x = torch.randn(2, 129, 32, device="cuda", dtype=dtype)
    run = torch.compile(model, fullgraph=True) if compiled else model

    with F.register_sdpa():
        choices = explain(run, x)
        assert [c.path for c in choices] == ["triton"] * len(choices) and choices
        y = run(x)
        (dx,) = torch.autograd.grad(run(x.requires_grad_()).sum(), x)
    want = model(x)
    (want_dx,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(y, want, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(dx, want_dx, atol=3e-2, rtol=3e-2)
    assert explain(model, x) == []  # torch's own again


def model(x: Tensor, w: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    h = F.embedding(ids, w) + x
    q = F.layer_norm(h, (16,), w[0], w[1]).unflatten(2, (2, 8)).transpose(1, 2)
    o = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
    y = F.rms_norm(F.dropout(F.gelu(F.linear(o, w, w[:, 0])), 0.0), (16,)).flatten(0, 1)
    losses = F.cross_entropy(y, ids.flatten()), F.linear_cross_entropy(y, w, ids.flatten())
    return *losses, y


def sizes(device: str) -> list[dict[str, Tensor]]:
    w = torch.randn(16, 16, device=device)
    return [
        {"x": torch.randn(2, T, 16, device=device), "w": w,
         "ids": torch.randint(16, (2, T), device=device)} for T in (5, 7, 9)
    ]  # fmt: skip


def test_compiles_in_one_graph() -> None:
    assert_one_graph(model, sizes("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZED, reason="Dynamo cannot trace the stand-in of the sanitizer")
def test_compiles_in_one_graph_through_the_kernels(device: str) -> None:
    calls = sizes(device)
    assert all(c.path == "triton" or c.op in ("gelu", "linear", "dropout")
               for c in explain(model, **calls[0]))  # fmt: skip
    assert_one_graph(model, calls)
