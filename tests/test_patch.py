"""Patched models compute what they computed: logits, losses, every gradient, training, dropout."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgpt
from fastgpt import explain, patch
from tests.foreign import FAMILIES, encoder, gpt2, ids, logits_of, loss_of, randomized

pytest.importorskip("transformers")

OPS = {
    "nanoGPT": {"layer_norm", "attention", "ffn"},
    "minGPT": {"layer_norm", "attention", "ffn"},
    "nn.TransformerEncoder": {"layer_norm", "attention", "ffn"},
    "GPT-2": {"layer_norm", "attention", "ffn", "linear_cross_entropy"},
    "OPT": {"layer_norm", "attention", "ffn", "linear_cross_entropy"},
    "GPT-NeoX, Pythia": {"layer_norm", "attention", "ffn", "linear_cross_entropy"},
    "GPT-NeoX, sequential": {"layer_norm", "attention", "ffn", "linear_cross_entropy"},
    "BERT, RoBERTa, ELECTRA": {"layer_norm", "attention", "ffn"},
    "Llama": {"rms_norm", "attention", "ffn", "linear_cross_entropy"},
}


def run(model: nn.Module) -> dict[str, Tensor]:
    """Logits, the loss, and every gradient by name."""
    x = ids()
    model.zero_grad()
    with torch.no_grad():
        out = {"logits": logits_of(model.eval(), x)}
    loss = loss_of(model.train(), x)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out | {"loss": loss.detach()} | grads


def another(family: str, model: nn.Module) -> Any:
    """With the same weights. No deepcopy: one of minGPT's blocks runs the first one's layers."""
    twin = FAMILIES[family]()
    twin.load_state_dict(model.state_dict())
    return twin


def assert_same(
    got: dict[str, Tensor], same: dict[str, Tensor], gold: dict[str, Tensor], atol: float = 1e-5
) -> None:
    """The tolerance law, for everything that the model gives."""
    assert set(got) == set(same) == set(gold)
    for name, truth in gold.items():
        assert got[name].dtype == same[name].dtype and got[name].shape == same[name].shape, name
        err, theirs = ((t.double() - truth).abs().max().item() for t in (got[name], same[name]))
        assert err <= 2 * theirs + atol, f"{name}: off by {err:.1e}, unpatched by {theirs:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients(family: str) -> None:
    model = randomized(FAMILIES[family]())
    gold = run(another(family, model).double())
    same = run(model)
    report = patch(model)
    heard = {choice.op for choice in explain(lambda: run(model))}
    assert heard == OPS[family], report
    assert_same(run(model), same, gold)
    report.undo()
    for name, t in run(model).items():
        assert torch.equal(t, same[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_have_the_same_losses(family: str) -> None:
    theirs = FAMILIES[family]().train()
    ours = another(family, theirs).train()
    patch(ours)
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for step in range(20):
            loss = loss_of(model, ids(seed=step % 3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[19] < losses[0] - 0.05  # they do learn
    torch.testing.assert_close(losses[20:], losses[:20], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f not in ("Llama", "nn.TransformerEncoder")]
)
def test_dropout_drops_the_same_with_the_same_seed(family: str) -> None:
    """All but the attention's, whose mask plain PyTorch draws in another way. A Llama has no other;
    torch's encoder draws in another order of the elements."""
    model = FAMILIES[family](dropout=0.3).train()
    for m in model.modules():
        if "attention" in type(m).__name__.lower():
            for name in ("dropout", "attention_dropout"):
                if isinstance(getattr(m, name, None), float):
                    setattr(m, name, 0.0)
            for name in ("attn_dropout", "dropout"):
                if isinstance(getattr(m, name, None), nn.Dropout):
                    getattr(m, name).p = 0.0
    x = ids()

    def go() -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        loss = loss_of(model, x)
        return loss, torch.autograd.grad(loss, next(model.parameters()))[0]

    loss, grad = go()
    report = patch(model)
    again, grad_again = go()
    assert (loss - loss_of(model.eval(), x)).abs() > 1e-4  # there was dropout
    torch.testing.assert_close(again, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_again, grad, atol=1e-5, rtol=1e-5)
    assert report.replaced


@pytest.mark.parametrize("family", ["nanoGPT", "minGPT", "nn.TransformerEncoder"])
def test_attention_drops_out_in_training_alone(family: str) -> None:
    model = FAMILIES[family](dropout=0.3)
    for name, m in model.named_modules():
        if isinstance(m, nn.Dropout) and not name.endswith("attn_dropout"):
            m.p = 0.0
    before = logits_of(model.eval(), ids())
    assert not [line for line in patch(model).left if "ttention" in line.kind]
    torch.testing.assert_close(logits_of(model, ids()), before, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        a, b = logits_of(model.train(), ids()), logits_of(model, ids())
    assert (a - b).abs().max() > 1e-3


def test_encoder_layer_drops_out_as_often_as_torch() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 64, 0.3, batch_first=True, norm_first=True)
    with torch.no_grad():
        for p in (*layer.self_attn.parameters(), *layer.linear2.parameters()):
            p.zero_()
        layer.self_attn.out_proj.bias.fill_(1.0)
        layer.linear2.bias.fill_(10.0)
    x = torch.zeros(8, 32, 64)
    patch(layer)
    branches = layer(x).mul(0.7).round().flatten()  # one of 1, one of 10, each there or dropped
    shares = [(branches == value).float().mean().item() for value in (0, 1, 10, 11)]
    assert shares == pytest.approx([0.09, 0.21, 0.21, 0.49], abs=0.02)
    assert torch.equal(layer.eval()(x), torch.full_like(x, 11.0))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"norm_first": False}, {"batch_first": False}, {"bias": False},
        {"activation": "relu", "norm_first": False},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("masks", ["none", "padding", "float", "bool", "causal"])
def test_encoder_layer_with_masks(options: dict[str, Any], masks: str) -> None:
    options = {"batch_first": True, "norm_first": True} | options
    layer = randomized(nn.TransformerEncoderLayer(32, 4, 48, 0.0, **options)).eval()
    x = torch.randn(3, 7, 32)
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    hidden[1, 5:] = True
    square = nn.Transformer.generate_square_subsequent_mask(7)
    choices: dict[str, dict[str, Any]] = {
        "none": {}, "padding": {"src_key_padding_mask": hidden}, "float": {"src_mask": square},
        "bool": {"src_mask": square.isinf(), "src_key_padding_mask": hidden},
        "causal": {"src_mask": square, "is_causal": True, "src_key_padding_mask": hidden},
    }  # fmt: skip
    given = choices[masks]
    x = x if options["batch_first"] else x.transpose(0, 1)
    gold = copy.deepcopy(layer).double()(
        x.double(), **{k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
                       for k, v in given.items()}
    )  # fmt: skip
    same = layer(x, **given)
    report = patch(layer)
    ran = {choice.op for choice in explain(layer, x, **given)}
    assert ran == {"layer_norm", "attention", "ffn"}, report
    assert_same({"y": layer(x, **given)}, {"y": same}, {"y": gold})


def test_multihead_attention_of_three_inputs_and_with_weights() -> None:
    m = randomized(nn.MultiheadAttention(32, 4, batch_first=True))
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    mask = torch.randn(8, 5, 7)
    before, weights = m(q, k, v, attn_mask=mask)
    patch(m)
    torch.testing.assert_close(m(q, k, v, attn_mask=mask, need_weights=False)[0], before)
    assert [c.op for c in explain(lambda: m(q, k, v, need_weights=False))] == ["attention"]
    assert torch.equal(m(q, k, v, attn_mask=mask)[1], weights)


def test_autocast_gives_the_dtypes_of_torch() -> None:
    model = encoder(norm_first=False).eval()
    x = torch.randn(2, 5, 32)
    norm = nn.LayerNorm(32)

    def dtypes() -> list[torch.dtype]:
        with torch.autocast("cpu", torch.bfloat16):
            return [norm(x.bfloat16()).dtype, norm(x).dtype, logits_of(model, ids()).dtype]

    before = dtypes()
    patch(norm)
    patch(model)
    assert dtypes() == before


@pytest.mark.parametrize(
    "family", ["nanoGPT", "minGPT", "GPT-2", "BERT, RoBERTa, ELECTRA", "Llama"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(family: str, dtype: torch.dtype) -> None:
    model = randomized(FAMILIES[family]()).to(dtype)
    gold, same = run(another(family, model).double()), run(model)
    patch(model)
    assert_same(run(model), same, gold, atol=2e-4)


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 0, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, ops",
    [
        ("mistral", {"rms_norm", "attention", "ffn", "linear_cross_entropy"}),
        ("qwen3", {"rms_norm", "attention", "ffn", "linear_cross_entropy"}),
        ("gemma", {"attention", "ffn", "linear_cross_entropy"}),  # its norms multiply by 1 + weight
        ("phi", {"layer_norm", "attention", "ffn", "linear_cross_entropy"}),
        ("starcoder2", {"layer_norm", "attention", "ffn", "linear_cross_entropy"}),
        ("cohere", {"layer_norm", "attention", "ffn"}),  # scales its logits
        ("gpt_neo", {"layer_norm", "ffn"}),  # attends in a way of its own
    ],
)
def test_families_that_the_code_does_not_name(kind: str, ops: set[str]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    more = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}
    config = AutoConfig.for_model(kind, **SIZES, **(more if kind == "gpt_neo" else {}))
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    model = randomized(AutoModelForCausalLM.from_config(config))
    gold, same = run(copy.deepcopy(model).double()), run(model)
    report = patch(model)
    assert {choice.op for choice in explain(lambda: run(model))} == ops, report
    assert_same(run(model), same, gold)


def test_loss_head_keeps_what_trainers_ask_for() -> None:
    model = gpt2().train()
    x = ids()
    labels = x.masked_fill(x % 5 == 0, -100)
    count = torch.tensor(17)
    shift = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    calls: list[dict[str, Any]] = [
        {"labels": labels}, {"labels": labels, "num_items_in_batch": count},
        {"labels": labels, "num_items_in_batch": 17}, {"labels": labels, "shift_labels": shift},
        {"labels": labels, "output_hidden_states": True, "use_cache": True},
        {"labels": labels, "attention_mask": (torch.arange(12) < torch.tensor([[12], [7]])).long()},
    ]  # fmt: skip
    before = [model(x, **call) for call in calls]
    patch(model)
    for call, theirs in zip(calls, before, strict=True):
        ours = model(x, **call)
        torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)
        assert ours.logits is None and theirs.logits is not None
        assert set(ours.keys()) == set(theirs.keys()) - {"logits"}
        for a, b in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert model(x, labels=labels, return_dict=False)[1].shape == (2, 12, 61)
    assert model.eval()(x, labels=labels).logits is not None  # as evaluation wants them
    model.train()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    assert model(x, labels=labels).logits is not None  # somebody else's loss
    untouched = gpt2().train()
    patch(untouched, loss_head=False)
    assert untouched(x, labels=labels).logits is not None


def test_generation_is_the_same() -> None:
    for family in ("GPT-2", "Llama", "OPT"):
        model = randomized(FAMILIES[family]()).eval()
        before = model.generate(ids(n=4), max_new_tokens=6, do_sample=False)
        patch(model)
        assert torch.equal(model.generate(ids(n=4), max_new_tokens=6, do_sample=False), before)


def test_compiles_whole() -> None:
    for family in ("nanoGPT", "minGPT", "GPT-2", "Llama", "BERT, RoBERTa, ELECTRA"):
        model = FAMILIES[family]().eval()
        patch(model)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, m=model: logits_of(m, x), fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(compiled(ids()), logits_of(model, ids()))


def test_what_was_compiled_before_notices() -> None:
    model = FAMILIES["nanoGPT"]().eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    before = logits_of(compiled, ids())
    report = patch(compiled)
    assert [line for line in report.replaced if line.kind == "NanoMLP"]
    hook = model.h[0].mlp.register_forward_hook(lambda m, a, y: y * 0.0)
    assert not torch.allclose(logits_of(compiled, ids()), before)
    hook.remove()
    torch.testing.assert_close(logits_of(compiled, ids()), before)


def test_gradient_checkpointing() -> None:
    model = gpt2().train()
    patch(model)
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss_of(model, ids()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["nanoGPT", "GPT-2", "Llama"])
def test_in_kernels(family: str, device: str) -> None:
    model = randomized(FAMILIES[family]()).to(device)
    x = ids(1, 8).to(device)
    gold = loss_of(copy.deepcopy(model).double().train(), x)
    patch(model.train())
    with fastgpt.use("triton"):
        loss = loss_of(model, x)
        loss.backward()
    assert (loss.double() - gold).abs() < 1e-5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
