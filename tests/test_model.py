"""GPT against Hugging Face's GPT-2, its own counts, its invariants, its errors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastgpt
from fastgpt.model import GPT, PRESETS, GPTConfig

SMALL = GPTConfig(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=32)


def small(**changes: Any) -> GPT:
    """A small model whose biases and norms are not at their initial values."""
    model = GPT(replace(SMALL, **changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, mean=0.5 if p.ndim == 1 else 0.0)
    return model


def ids(B: int = 2, T: int = 9, V: int = 97) -> Tensor:
    return torch.randint(0, V, (B, T))


def hugging_face(model: GPT) -> nn.Module:
    """Hugging Face's GPT-2 with the same weights; its linear layers are (in, out)."""
    import transformers

    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config)
    weights = {name: as_theirs(name, p.detach()) for name, p in model.state_dict().items()}
    result = theirs.transformer.load_state_dict(weights)
    assert not result.missing_keys
    assert not result.unexpected_keys
    return theirs  # type: ignore[no-any-return]


def as_theirs(name: str, t: Tensor) -> Tensor:
    linear = t.ndim == 2 and name.startswith("h.")
    return t.T.contiguous() if linear else t


def test_matches_hugging_face() -> None:
    model = small().double()
    theirs = hugging_face(model).double()
    x = ids(3, 16)
    torch.testing.assert_close(model(x), theirs(x).logits)
    loss = model(x[:, :-1], x[:, 1:])
    their_loss = F.cross_entropy(theirs(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(loss.float(), theirs(x, labels=x).loss)  # they round to float32
    torch.autograd.backward([loss, their_loss])
    grads = {name: p.grad for name, p in theirs.transformer.named_parameters()}  # type: ignore[union-attr]
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(as_theirs(name, p.grad), grads[name], msg=name)


@pytest.mark.gpu
def test_kernels_train_as_the_reference_does(device: str) -> None:
    model, gold = small().to(device), small().to(device).double()
    gold.load_state_dict(model.state_dict())
    x, y = ids().to(device), ids().to(device)
    with fastgpt.use("triton"):
        model(x, y).backward()
    with fastgpt.use("reference"):
        loss = gold(x, y)
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), gold.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        error = (p.grad - q.grad).abs().max() / q.grad.abs().max()
        assert error < 1e-4, f"{name}: {error}"


@given(T=st.integers(2, 16), data=st.data())
@settings(max_examples=25)
def test_the_future_does_not_leak(T: int, data: st.DataObject) -> None:
    model = small()
    t = data.draw(st.integers(1, T - 1))
    x = ids(2, T)
    other = x.clone()
    other[:, t] = (other[:, t] + 1) % 97
    before, after = model(x), model(other)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])


def test_the_output_layer_is_the_embedding() -> None:
    model = small()
    assert not [name for name in model.state_dict() if "lm_head" in name]
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.wte.weight.T)


def test_starts_as_gpt2_does() -> None:
    model = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        elif p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            want = 0.02 / 4.0 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8) = 4
            assert abs(float(p.detach().std()) / want - 1.0) < 0.03, name
            assert abs(float(p.detach().mean())) < 0.1 * want, name


def test_an_untrained_model_knows_nothing() -> None:
    model = GPT(GPTConfig.preset("tiny"))
    loss = model(ids(4, 32, 2048), ids(4, 32, 2048))
    assert abs(float(loss.detach()) - 7.6246) < 0.15  # log 2048
    assert loss.shape == ()


@pytest.mark.parametrize(
    "name, want",
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_has_as_many_parameters_as_the_released_models(name: str, want: int) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert model.num_params() == want
    c = model.config
    embeddings = (c.vocab_size + c.block_size) * c.n_embd
    assert model.num_params(embeddings=False) == want - embeddings


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("gpt3")])
def test_gpt3_has_about_the_parameters_in_its_name(name: str) -> None:
    with torch.device("meta"):
        n = GPT(GPTConfig.preset(name)).num_params()
    said = float(name[5:-1]) * (1e9 if name.endswith("b") else 1e6)
    assert abs(n / said - 1.0) < 0.05


@pytest.mark.parametrize("T, change", [(1, {}), (5, {}), (16, {"n_head": 3, "n_head_dim": 8})])
def test_flops_are_those_that_torch_counts(T: int, change: dict[str, Any]) -> None:
    model = GPT(replace(SMALL, **change))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids(1, T))
    c = model.config
    # torch counts all T x T pairs, of which a causal model needs those with key <= query.
    future = 2 * 2 * c.n_layer * c.n_head * c.head_dim * T * (T - 1) // 2
    assert counter.get_total_flops() - future == model.flops(T)


def test_training_takes_three_times_the_flops() -> None:
    fastgpt.ops.register_flop_formulas()  # torch's counter knows no loss head
    model = small()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids(1, 16), ids(1, 16)).backward()
    c = model.config
    future = 3 * 2 * 2 * c.n_layer * c.n_embd * 16 * 15 // 2
    assert counter.get_total_flops() - future == model.flops(16, training=True)


def test_targets_of_minus_100_take_no_part() -> None:
    model = small()
    x, y = ids(), ids()
    y[:, 4:] = -100
    torch.testing.assert_close(model(x, y), model(x[:, :4], y[:, :4]))


def test_optimizer_decays_matrices_only() -> None:
    optimizer = small().configure_optimizer(1e-3, weight_decay=0.3)
    assert optimizer.defaults["fused"]
    for group in optimizer.param_groups:
        dims = {p.ndim for p in group["params"]}
        assert (dims == {2}) if group["weight_decay"] == 0.3 else (dims == {1})
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(small().parameters()))


@pytest.mark.parametrize(
    "change",
    [{"bias": False}, {"activation": "relu"}, {"n_layer": 1}, {"n_head": 3, "n_head_dim": 8}],
    ids=str,
)
def test_a_variant_trains(change: dict[str, Any]) -> None:
    model = GPT(replace(SMALL, **change))
    optimizer = model.configure_optimizer(1e-2)
    x = ids(4, 16)
    first = None
    for _ in range(30):
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = float(loss.detach()) if first is None else first
    assert first is not None
    assert float(loss.detach()) < first - 1.0
    assert any("bias" in name for name in model.state_dict()) is model.config.bias


def test_compiles_whole() -> None:
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y = ids(), ids()
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x, y), model(x, y))


def test_autocast_keeps_the_residual_stream_and_the_loss_wide() -> None:
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids()).dtype == torch.bfloat16
        loss = model(ids(), ids())
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_int32_ids_are_ids() -> None:
    model, x = small(), ids()
    assert torch.equal(model(x.int()), model(x))


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(2, 3), TypeError, r"^GPT: idx must be int64 or int32; got torch.float32$"),
        (torch.zeros(3).long(), ValueError, r"^GPT: idx must be \(B, T\).*; got \(3,\)$"),
        (torch.zeros(2, 0).long(), ValueError, r"^GPT: idx must be \(B, T\).*; got \(2, 0\)$"),
        (torch.zeros(1, 17).long(), ValueError, r"^GPT: .* block_size 16 tokens; got 17$"),
        (torch.tensor([[0, 97]]), ValueError, r"^GPT: ids must lie in .*, 0 to 96; got 97$"),
        (torch.tensor([[-3, 5]]), ValueError, r"^GPT: ids must lie in .*, 0 to 96; got -3$"),
    ],
    ids=["float", "one dimension", "empty", "too long", "too large", "negative"],
)
def test_rejects_ids(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small()(x)


@pytest.mark.parametrize(
    "y, error, message",
    [
        (ids(2, 8), ValueError, r"^GPT: targets must have idx's shape; got targets \(2, 8\), idx"),
        (ids().int(), TypeError, r"^GPT: targets must be int64; got torch.int32$"),
        (
            ids() + 97,
            ValueError,
            r"^linear_cross_entropy: targets must be .* in \[0, 97\); got \d+$",
        ),
        (ids() - 97, ValueError, r"^linear_cross_entropy: targets must .* in \[0, 97\); got -\d+$"),
    ],
    ids=["shape", "dtype", "too large", "negative"],
)
def test_rejects_targets(y: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small()(ids(), y)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"n_layer": 0}, ValueError, r"n_layer must be at least 1; got 0"),
        ({"n_embd": 3.5}, TypeError, r"n_embd must be an int; got 3.5"),
        ({"n_layer": True}, TypeError, r"n_layer must be an int; got True"),
        (
            {"n_head": 3},
            ValueError,
            r"n_embd must be a multiple of n_head; got n_embd 32, n_head 3",
        ),
        ({"n_head": 8}, ValueError, r"a multiple of 8, at most 256; got 32 / 8 = 4"),
        ({"n_head_dim": 12}, ValueError, r"n_head_dim must be a multiple of 8, .*; got 12"),
        ({"n_embd": 1024}, ValueError, r"a multiple of 8, at most 256; got 1024 / 2 = 512"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\); got 1.0"),
        ({"dropout": "no"}, TypeError, r"dropout must be a number; got 'no'"),
        ({"bias": 1}, TypeError, r"bias must be True or False; got 1"),
        ({"activation": "tanh"}, ValueError, r"activation must be one of gelu_tanh, .*'tanh'"),
    ],
    ids=str,
)
def test_rejects_a_shape(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^GPTConfig: .*{message}$"):
        replace(SMALL, **change)


def test_rejects_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"^GPTConfig: the preset must be one of tiny, .*'gpt5'$"):
        GPTConfig.preset("gpt5")
