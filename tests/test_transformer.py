"""The drop-ins for torch's attention and transformer layers, against torch's own."""

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgpt import explain
from fastgpt.layers import (
    LayerNorm,
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from tests.check import assert_matches
from tests.conftest import DTYPES, SANITIZED

PAIRS = [
    (MultiheadAttention, nn.MultiheadAttention),
    (TransformerEncoderLayer, nn.TransformerEncoderLayer),
    (TransformerDecoderLayer, nn.TransformerDecoderLayer),
]

# The sanitizer's questions to the kernels are their own tests': here one dtype is enough for it.
FEW = DTYPES[-1:] if SANITIZED else DTYPES


def twins(ours: Any, theirs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """One of ours and one of torch's, made after the same seed."""
    made = []
    for kind in (ours, theirs):
        torch.manual_seed(3)
        made.append(kind(*args, **kwargs))
    return made[0], made[1]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p[0].__name__)
@pytest.mark.parametrize("bias", [True, False])
def test_constructor_init_and_state_dict_are_torchs(pair: Any, bias: bool) -> None:
    ours, theirs = twins(*pair, 16, 4, bias=bias, dtype=torch.float64)
    for kind in (pair[0].__init__, pair[0].forward):
        name = kind.__name__
        assert list(inspect.signature(kind).parameters) == list(
            inspect.signature(getattr(pair[1], name)).parameters
        )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert isinstance(ours, pair[1])
    again = copy.deepcopy(ours)
    again.load_state_dict(theirs.state_dict())


def test_other_widths_and_extra_keys_are_initialised_as_torchs() -> None:
    ours, theirs = twins(*PAIRS[0], 16, 4, add_bias_kv=True, kdim=24, vdim=8)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


def assert_same(got: Any, want: Any, inputs: list[Tensor], modules: tuple[Any, Any]) -> None:
    """Values, and gradients by inputs and parameters."""
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    ours, theirs = (
        torch.autograd.grad(y, [*inputs, *m.parameters()], dy, allow_unused=True)
        for y, m in zip((got, want), modules, strict=True)
    )
    for g, w in zip(ours, theirs, strict=True):
        assert (g is None) == (w is None)
        if g is not None and w is not None:
            torch.testing.assert_close(g, w)


@settings(max_examples=150)
@given(
    batch=st.sampled_from([None, "first", "second"]),
    tied=st.sampled_from(["all", "keys", "none"]),
    padding=st.sampled_from([None, "bool", "float"]),
    mask=st.sampled_from([None, "bool", "float", "heads", "causal"]),
    extras=st.sampled_from(["", "kv", "zero", "kv zero"]),
    bias=st.booleans(),
    heads=st.sampled_from([1, 2, 3]),
)
def test_attention_is_torchs(
    batch: str | None, tied: str, padding: str | None, mask: str | None, extras: str, bias: bool,
    heads: int,
) -> None:  # fmt: skip
    C, B, Tq, Tk = 24, 2, 5, (5 if tied == "all" or mask == "causal" else 7)
    widths = {"kdim": 12, "vdim": 20} if tied == "none" and heads == 3 else {}
    modules = twins(
        *PAIRS[0], C, heads, bias=bias, batch_first=batch == "first", add_bias_kv="kv" in extras,
        add_zero_attn="zero" in extras, dtype=torch.float64, **widths,
    )  # fmt: skip
    for m in modules:
        for p in m.parameters():
            torch.manual_seed(p.numel())
            nn.init.normal_(p, std=0.3)

    def shaped(T: int, width: int) -> Tensor:
        lead = {None: (T,), "first": (B, T), "second": (T, B)}[batch]
        return torch.randn(*lead, width, dtype=torch.float64, requires_grad=True)

    q = shaped(Tq, C)
    k = q if tied == "all" else shaped(Tk, widths.get("kdim", C))
    v = k if tied != "none" else shaped(Tk, widths.get("vdim", C))
    kwargs: dict[str, Any] = {"need_weights": False}
    n = 1 if batch is None else B
    if padding:
        hide = torch.arange(Tk) >= torch.tensor([Tk - 2, Tk])[:n, None]
        kwargs["key_padding_mask"] = hide if padding == "bool" else torch.randn(n, Tk).double()
        if batch is None:
            kwargs["key_padding_mask"] = kwargs["key_padding_mask"][0]
    if mask == "causal":
        kwargs |= {"attn_mask": torch.ones(Tq, Tk, dtype=torch.bool).triu(1), "is_causal": True}
    elif mask:
        shape = (n * heads, Tq, Tk) if mask == "heads" else (Tq, Tk)
        kwargs["attn_mask"] = torch.randn(shape).double()
        if mask == "bool":
            kwargs["attn_mask"] = kwargs["attn_mask"] > 0.5
            kwargs["attn_mask"][:, 0] = False
    outs = [m(q, k, v, **kwargs) for m in modules]
    assert outs[0][1] is outs[1][1] is None
    inputs = list({id(t): t for t in (q, k, v)}.values())
    assert_same(outs[0][0], outs[1][0], inputs, modules)


@pytest.mark.parametrize("average", [True, False])
def test_attention_returns_weights(average: bool) -> None:
    ours, theirs = twins(*PAIRS[0], 16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    got, want = (m(x, x, x, average_attn_weights=average) for m in (ours, theirs))
    torch.testing.assert_close(got, want)
    assert "need_weights" in str(explain(lambda: ours(x, x, x))[0]) or explain()


@pytest.mark.parametrize(
    "bad",
    [
        {"attn_mask": torch.zeros(4, 5, dtype=torch.bool)},
        {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)},
        {"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)},
        {"is_causal": True},
        {"query": torch.randn(2, 5, 12)},
        {"query": torch.randn(1, 2, 5, 16)},
        {"key": torch.randn(2, 6, 16)},
    ],
    ids=["mask shape", "mask dtype", "padding shape", "hint", "width", "dimensions", "keys"],
)
def test_attention_refuses_what_torch_refuses(bad: dict[str, Any]) -> None:
    x = torch.randn(2, 5, 16)
    raised = []
    for m in twins(*PAIRS[0], 16, 4, batch_first=True):
        with pytest.raises(Exception) as caught:
            m(**{"query": x, "key": x, "value": x, "need_weights": False, **bad})
        raised.append((type(caught.value), str(caught.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "dropout"])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu, nn.GELU("tanh"), torch.tanh])
def test_encoder_layer_is_torchs(norm_first: bool, mode: str, activation: Any) -> None:
    modules = twins(
        *PAIRS[1], 16, 4, 40, dropout=0.3 if mode == "dropout" else 0.0, activation=activation,
        batch_first=mode != "dropout", norm_first=norm_first, dtype=torch.float64,
    )  # fmt: skip
    # With batch_first torch's branches lie in memory as without, and so do the elements it drops.
    shape = (6, 3, 16) if mode == "dropout" else (3, 6, 16)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    padding = torch.arange(6) >= torch.tensor([6, 4, 1])[:, None]
    for kwargs in (
        {}, {"src_mask": causal, "is_causal": True}, {"src_key_padding_mask": padding},
        {"src_mask": causal, "src_key_padding_mask": padding, "is_causal": True},
    ):  # fmt: skip
        outs = []
        for m in modules:
            m.train(mode != "eval")
            torch.manual_seed(1)  # the same elements are dropped: in plain PyTorch
            outs.append(m(x, **kwargs))
        assert_same(outs[0], outs[1], [x], modules)
        if mode == "eval" and type(activation) is not nn.GELU:
            with torch.no_grad():  # torch's fast path, which takes any nn.GELU for that by erf
                fast = modules[1](x, **kwargs)
            seen = ~padding if "src_key_padding_mask" in kwargs else slice(None)
            torch.testing.assert_close(outs[0][seen], fast[seen])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("p, batch_first", [(0.0, True), (0.0, False), (0.3, False)])
def test_decoder_layer_is_torchs(norm_first: bool, p: float, batch_first: bool) -> None:
    modules = twins(
        *PAIRS[2], 16, 2, 40, dropout=p, norm_first=norm_first, batch_first=batch_first,
        dtype=torch.float64,
    )  # fmt: skip
    x, memory = (
        torch.randn(*((3, T) if batch_first else (T, 3)), 16, dtype=torch.float64,
                    requires_grad=True)
        for T in (6, 5)
    )  # fmt: skip
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    padding = torch.arange(5) >= torch.tensor([5, 4, 1])[:, None]
    for kwargs in (
        {}, {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding},
        {"memory_mask": torch.randn(6, 5, dtype=torch.float64)},
    ):  # fmt: skip
        outs = []
        for m in modules:
            torch.manual_seed(1)
            outs.append(m(x, memory, **kwargs))
        assert_same(outs[0], outs[1], [x, memory], modules)


@pytest.mark.parametrize("padded", [True, False])
def test_runs_inside_of_torchs_encoder(padded: bool) -> None:
    layers = twins(PAIRS[1][0], PAIRS[1][1], 16, 4, 32, batch_first=True)
    ours, theirs = (nn.TransformerEncoder(layer, 2, nn.LayerNorm(16)).eval() for layer in layers)
    x = torch.randn(3, 6, 16)
    padding = torch.arange(6) >= torch.tensor([6, 4, 1])[:, None] if padded else None
    with torch.no_grad():  # padded, torch hands its layers a nested tensor
        got, want = (m(x, src_key_padding_mask=padding) for m in (ours, theirs))
    torch.testing.assert_close(got, want)


def test_parts_that_were_changed_keep_their_forward() -> None:
    layer, plain = twins(*PAIRS[1], 16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
    heard = []
    layer.linear1.register_forward_hook(lambda *_: heard.append(1))
    layer.norm2 = nn.Identity()
    plain.norm2 = nn.Identity()
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(x), plain(x))
    assert heard == [1]
    assert type(layer.norm1) is LayerNorm


def test_a_mask_of_everything_gives_what_torch_gives() -> None:
    ours, theirs = twins(*PAIRS[0], 16, 2, batch_first=True)
    x, hide = torch.randn(2, 4, 16), torch.ones(2, 4, dtype=torch.bool)
    hide[0] = False
    got, want = (m(x, x, x, hide, need_weights=False)[0] for m in (ours, theirs))
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FEW, ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "both", "float"])
def test_encoder_layer_through_the_kernels(dtype: torch.dtype, mask: str, device: str) -> None:
    T, C = 19, 32
    layer, plain = (
        m.to(device, dtype) for m in twins(*PAIRS[1], C, 2, 48, dropout=0.0, batch_first=True)
    )
    causal = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
    padding = torch.arange(T, device=device) >= torch.tensor([T, 11], device=device)[:, None]
    cases: dict[str, dict[str, Any]] = {
        "none": {}, "causal": {"src_mask": causal, "is_causal": True},
        "padding": {"src_key_padding_mask": padding},
        "both": {"src_mask": causal, "is_causal": True, "src_key_padding_mask": padding},
        "float": {"src_mask": torch.randn(T, T, device=device)},
    }  # fmt: skip
    kwargs = cases[mask]
    seen = ~padding[..., None] if "src_key_padding_mask" in kwargs else True

    def through(m: nn.Module) -> Any:
        def f(x: Tensor, **parameters: Tensor) -> Tensor:
            given = {names[k]: v for k, v in parameters.items()}
            masks = {
                k: v.to(x.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
                for k, v in kwargs.items()
            }
            y = torch.func.functional_call(m, given, (x,), masks)
            return torch.where(torch.as_tensor(seen, device=device), y, 0.0)

        return f

    x = torch.randn(2, T, C, device=device, dtype=dtype)
    choices = explain(lambda: layer(x, **kwargs))
    assert {c.op for c in choices if c.path == "triton"} == {"attention", "layer_norm", "ffn"}
    names = {name.replace(".", "_"): name for name, _ in layer.named_parameters()}
    leaves = {name: layer.get_parameter(of).detach() for name, of in names.items()}
    assert_matches(through(layer), through(plain), {"x": x, **leaves})
