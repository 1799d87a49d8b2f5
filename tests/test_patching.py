"""What patch leaves as it was, what it says, what it refuses, and how it is undone."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt import explain, layers, patch
from fastgpt.patching import Report
from tests.conftest import ROOT
from tests.foreign import (
    FAMILIES,
    C,
    NanoMLP,
    NanoNorm,
    gpt2,
    ids,
    llama,
    logits_of,
    loss_of,
    mingpt,
    nanogpt,
    randomized,
)
from tests.test_patch import assert_same
from tests.test_pretrained_gpt2 import GREEDY, microformer  # noqa: F401

pytest.importorskip("transformers")


def ops_of(model: nn.Module) -> set[str]:
    return {choice.op for choice in explain(logits_of, model, ids())}


def state(model: nn.Module) -> Any:
    """All that patch must not change, or must give back."""
    return (
        [(n, id(m), m.training, type(m).__name__) for n, m in model.named_modules()],
        [(n, id(p), p._version, p.requires_grad) for n, p in model.named_parameters()],
        [(n, id(b)) for n, b in model.named_buffers()],
        list(model.state_dict()),
        [sorted(m.__dict__) for m in model.modules()],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_the_objects_that_it_was(family: str) -> None:
    model = FAMILIES[family](dropout=0.1)
    next(model.parameters()).requires_grad_(False)
    classes = [type(m) for m in model.modules()]
    before, rng = state(model), torch.get_rng_state()
    report = patch(model)
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    report.undo()
    report.undo()  # once more is nothing
    assert state(model) == before
    assert [type(m) for m in model.modules()] == classes


def test_an_optimizer_goes_on() -> None:
    losses = []
    for at in (5, 99):
        torch.manual_seed(0)
        model = nanogpt().train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(10):
            if step == at:
                patch(model)
            loss = loss_of(model, ids())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_hooks_fire_as_often_as_before() -> None:
    def count(model: nn.Module, fired: list[str]) -> None:
        for name, m in model.named_modules():
            if isinstance(m, nn.ModuleDict):
                continue
            m.register_forward_pre_hook(lambda *_, n=name: fired.append(f"pre {n}"))
            m.register_forward_hook(lambda *_, n=name: fired.append(f"forward {n}"))
            m.register_full_backward_hook(lambda *_, n=name: fired.append(f"backward {n}"))

    heard: list[list[str]] = []
    for patched in (False, True):
        fired: list[str] = []
        model = nanogpt()
        count(model, fired)
        if patched:
            patch(model)
            assert not fired  # recognising a module calls no hook
        loss_of(model, ids()).backward()
        heard.append(sorted(fired))
    assert heard[0] == heard[1] and heard[0]


def test_hooks_of_patched_modules_see_their_outputs_and_inner_ones_unfuse() -> None:
    model = nanogpt().eval()
    seen: dict[str, Tensor] = {}
    model.h[0].mlp.register_forward_hook(lambda m, a, y: seen.update(mlp=y))
    logits_of(model, ids())
    before = seen["mlp"]
    patch(model)
    logits_of(model, ids())
    torch.testing.assert_close(seen["mlp"], before)
    ran = [c.op for c in explain(logits_of, model, ids())]
    handle = model.h[0].mlp.c_fc.register_forward_hook(lambda m, a, y: seen.update(inner=y))
    again = [c.op for c in explain(logits_of, model, ids())]
    assert "inner" in seen and again.count("ffn") == ran.count("ffn") - 1
    unpatched = nanogpt()
    unpatched.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)
    whys = {line.name: line.why for line in patch(unpatched).replaced}
    assert "hooks" in whys["h.0.mlp"] and not whys["h.1.mlp"]
    handle.remove()
    norm = model.h[1].ln_2.register_forward_hook(lambda m, a, y: y * 0.0)
    assert not torch.allclose(logits_of(model, ids()), model(ids())[0] + 1)
    norm.remove()
    assert [c.op for c in explain(logits_of, model, ids())] == ran


def test_an_adapter_in_a_layers_place_is_not_overlooked() -> None:
    class LoRA(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 1.0  # type: ignore[no-any-return]

    a, b = nanogpt().eval(), nanogpt().eval()
    b.load_state_dict(a.state_dict())
    patch(a)
    for model in (a, b):
        model.h[0].mlp.c_fc = LoRA(model.h[0].mlp.c_fc)
        model.h[1].ln_2 = nn.Identity()
    torch.testing.assert_close(logits_of(a, ids()), logits_of(b, ids()))
    report = patch(model)
    assert "LoRA" not in {line.kind for line in report.replaced}


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles(family: str) -> None:
    model = FAMILIES[family]().eval()
    patch(model)
    want = logits_of(model, ids())
    copies = [copy.deepcopy(model), copy.copy(model)]
    if family != "minGPT":  # has a lambda in it
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        assert torch.equal(logits_of(other, ids()), want)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert ops_of(other) == ops_of(model)
    other = copies[0]
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(logits_of(model, ids()), want)  # a deepcopy has its own weights
    assert not torch.equal(logits_of(other, ids()), want)


def test_saved_whole_and_loaded_by_another_process(tmp_path: Path) -> None:
    model = gpt2().eval()
    patch(model)
    torch.save((model, ids(), logits_of(model, ids())), tmp_path / "model.pt")
    code = (
        "import torch\n"
        f"model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.equal(model(x).logits, y)\n"
        "print(type(model.transformer.h[0]).__mro__[1].__name__, model.config._attn_implementation)"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert got.stdout.split() == ["PatchedBlock", "fastgpt"], got.stderr


def test_saved_as_transformers_saves(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = gpt2().eval()
    patch(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == "GPT2LMHeadModel"
    torch.testing.assert_close(logits_of(again.eval(), ids()), logits_of(model, ids()))


def test_twice_is_once() -> None:
    model = gpt2().eval()
    before = logits_of(model, ids())
    first = patch(model)
    classes = [type(m) for m in model.modules()]
    second = patch(model)
    assert [type(m) for m in model.modules()] == classes
    assert not [line for line in second.replaced if not line.runs.startswith("in ")]
    assert {line.why for line in second.lines if line.name.endswith("mlp")} == {"patched already"}
    second.undo()
    assert [type(m) for m in model.modules()] == classes
    first.undo()
    assert torch.equal(logits_of(model, ids()), before)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_has_every_module_and_a_reason(family: str) -> None:
    model = FAMILIES[family]()
    report = patch(model)
    assert isinstance(report, Report)
    assert [line.name for line in report.lines] == [n for n, _ in model.named_modules()]
    assert all(line.why for line in report.left)
    assert len(report.replaced) + len(report.left) == len(report.lines)
    text = str(report).splitlines()
    assert text[0] == f"{len(report.replaced)} of {len(report.lines)} modules replaced"
    assert len({line.index("class") for line in text[1:2]}) == 1
    counts = sum(int(line.split()[1]) for line in text[2:] if not line.startswith("(the model)"))
    assert counts == len(report.lines) - 1


def test_cross_attention_takes_the_blocks_own_way() -> None:
    model = randomized(gpt2(add_cross_attention=True)).eval()
    x, seen = ids(), torch.randn(2, 5, C)
    before = [model(x, encoder_hidden_states=seen).logits, model(x).logits]
    patch(model)
    after = [model(x, encoder_hidden_states=seen).logits, model(x).logits]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


class Odd(nn.Module):
    """A linear layer of a kind of its own, as quantization makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))  # type: ignore[no-any-return]


class Packed(Tensor):
    pass


class Linear4bit(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round()


def test_quantized_layers_are_left() -> None:
    of_a_subclass, of_a_type = Odd(), Odd()
    of_a_subclass.up.weight = nn.Parameter(of_a_subclass.up.weight.detach().as_subclass(Packed))
    of_a_type.up = Linear4bit(C, C)
    exchanged = Odd()
    exchanged.up.forward = lambda x: x  # type: ignore
    for module, why in ((of_a_subclass, "a weight is a Packed"), (of_a_type, ""), (exchanged, "")):
        before = module(torch.ones(2, C))
        line = patch(module).lines[0]
        assert not line.runs and why in line.why
        assert torch.equal(module(torch.ones(2, C)), before)


@pytest.mark.parametrize(
    "model, replace, error, message",
    [
        ("nanogpt", {}, TypeError, "model must be an nn.Module; got str"),
        (mingpt, {nn.Conv1d: layers.LayerNorm}, ValueError, "names Conv1d, of which the model has"),
        (mingpt, {"LayerNorm": layers.LayerNorm}, TypeError, "must map classes .*; got 'Lay"),
        (mingpt, {None: layers.LayerNorm}, TypeError, "got None"),
        (mingpt, {nn.LayerNorm: len}, TypeError, "got <built-in function len>"),
        (mingpt, {nn.LayerNorm: nn.Linear}, ValueError, "LayerNorm may be replaced by .*; got Lin"),
        (mingpt, {nn.LayerNorm: layers.RMSNorm}, ValueError, "cannot be RMSNorm: it computes l"),
        (mingpt, {nn.Embedding: layers.LayerNorm}, ValueError, r"'wte' .* not a weight \(N,\)"),
        (mingpt, {nn.GELU: layers.MLP}, ValueError, "names GELU, of which"),
        (nanogpt, {NanoMLP: layers.GatedMLP}, ValueError, "cannot be GatedMLP: it has no gate"),
        (nanogpt, {NanoMLP: layers.CausalSelfAttention}, ValueError, "cannot be CausalSelf"),
        (nanogpt, {NanoNorm: layers.MLP}, ValueError, "cannot be MLP: its forward does not"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)  # fmt: skip
def test_errors_leave_the_model_alone(model: Any, replace: Any, error: Any, message: str) -> None:
    made = model if isinstance(model, str) else model()
    before = None if isinstance(made, str) else [type(m) for m in made.modules()]
    with pytest.raises(error, match=f"^patch: .*{message}") as caught:
        patch(made, replace=replace)
    assert "\n" not in str(caught.value)
    if before is not None:
        assert [type(m) for m in made.modules()] == before


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = nanogpt()
    with pytest.raises(ValueError, match=r"^patch: .* its weights; wte.weight is on the"):
        patch(model)
    assert type(model.ln_f) is NanoNorm


def test_all_or_nothing() -> None:
    class Stubborn(nn.LayerNorm):
        @property
        def __class__(self) -> Any:
            return type(self)

        @__class__.setter
        def __class__(self, new: Any) -> None:
            raise TypeError("no")

    model = nn.Sequential(nn.LayerNorm(C), Stubborn(C))
    with pytest.raises(TypeError, match="no"):
        patch(model)
    assert type(model[0]) is nn.LayerNorm


def test_attention_chosen_by_the_user_stays() -> None:
    model = llama()
    model.config._attn_implementation_internal = "flex_attention"
    report = patch(model)
    lines = {line.name: line for line in report.lines}
    assert lines["model.layers.0.self_attn"].why == "attn_implementation is 'flex_attention'"
    assert model.config._attn_implementation == "flex_attention"


def test_attention_of_a_class_that_is_to_be_left_alone() -> None:
    model = llama()
    kind = type(model.model.layers[0].self_attn)
    lines = {line.name: line for line in patch(model, replace={kind: None}).lines}
    assert lines["model.layers.1.self_attn"].why == "replace says so"
    assert model.config._attn_implementation == "sdpa"


def test_a_model_with_padding_sees_none_of_it() -> None:
    model = randomized(gpt2()).eval()
    patch(model)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    x = ids()
    changed = x.clone()
    changed[0, :5] = 7
    a, b = (model(t, attention_mask=mask).logits for t in (x, changed))
    assert torch.equal(a[0, 5:], b[0, 5:]) and not torch.equal(a[0, :5], b[0, :5])


TABLE = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_readmes_table_is_what_patch_does(family: str) -> None:
    report = patch(FAMILIES[family]())
    runs = [line.runs for line in report.replaced]
    norm = next(r for r in runs if r in ("layer_norm", "rms_norm"))
    sums = sum("with the residual add" in r for r in runs)
    names = ("gelu_tanh", "gelu", "relu", "gated silu")
    acts = [name for name in names if any(f"ffn ({name})" in r for r in runs)]
    row = (
        family, norm, {0: "-", 2: "first", 4: "both"}[sums], "".join(acts) or "-",
        "yes" if any(r.startswith("attention") for r in runs) else "-",
        "yes" if any("linear_cross_entropy" in r for r in runs) else "-",
    )  # fmt: skip
    assert f"| {' | '.join(row)} |" in TABLE


def test_nanogpts_own_file(request: pytest.FixtureRequest) -> None:
    """The model as its users have it: `pytest --nanogpt .../nanoGPT/model.py`."""
    path = request.config.getoption("--nanogpt")
    if path is None:
        pytest.skip("no --nanogpt=PATH of its model.py")
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["nanogpt_model"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=2, n_embd=32)
    model = randomized(module.GPT(config))
    x = ids()

    def go(m: Any, x: Tensor) -> dict[str, Tensor]:
        m.zero_grad()
        logits, loss = m(x[:, :-1], x[:, 1:].contiguous())
        loss.backward()
        grads = {n: p.grad for n, p in m.named_parameters()}
        return {"logits": logits.detach(), "loss": loss.detach()} | grads

    gold, same = go(copy.deepcopy(model).double(), x), go(model, x)
    report = patch(model)
    assert {line.runs for line in report.lines if line.name.startswith("transformer.h.0")} >= {
        "layer_norm with the residual add", "attention (causal)", "ffn (gelu)", "layer_norm"
    }  # fmt: skip
    assert_same(go(model, x), same, gold)


@torch.no_grad()
def test_real_weights_of_gpt2s_architecture(microformer: Path) -> None:  # noqa: F811
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel.from_pretrained(microformer).eval()
    report = patch(model)
    assert len([line for line in report.replaced if line.kind == "GPT2MLP"]) == 8
    x = torch.arange(4, 68)[None]
    out = model(x, labels=x)
    assert out.loss.item() == pytest.approx(11.850423, abs=2e-5)
    assert out.logits.abs().mean().item() == pytest.approx(1.921163, abs=1e-5)
    assert out.logits[0, -8:].argmax(-1).tolist() == [6962, 423, 423, 423, 423, 3177, 8726, 8704]
    text = model.generate(
        torch.tensor([[2]]), max_new_tokens=31, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert text.tolist() == [GREEDY]
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    out = model.train()(x, labels=x)
    assert out.logits is None and out.loss.item() == pytest.approx(11.850423, abs=2e-5)
