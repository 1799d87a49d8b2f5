"""attn_implementation="fastgpt": transformers' own models give the numbers of their eager path."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
)
from transformers.masking_utils import (
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from fastgpt import explain, huggingface, use
from fastgpt.huggingface.attention import attention
from fastgpt.huggingface.mask import attention_mask
from tests.hf_models import FAMILIES, VOCAB, make, prompts

GPT2, LLAMA, MISTRAL = "gpt2", "llama, grouped", "mistral, window"
SOFTCAP = "gemma 2, softcap, windows"


def outputs(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Loss, logits and all gradients, of what padding has no part in."""
    model.zero_grad()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100  # would be predicted from padding, which sees nothing
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach() * mask[..., None], **grads}


def assert_lawful(family: str, side: str, device: str = "cpu", path: str = "auto") -> None:
    """At most twice the error that eager makes in float32, against float64."""
    ids, mask = (t.to(device) for t in prompts(side))
    # Eager's smallest float64 makes NaN of queries that see nothing; torch's own makes zeros.
    gold = outputs(
        make(family, "eager" if side == "none" else "sdpa").to(device).double(), ids, mask
    )
    theirs = outputs(make(family, "eager").to(device), ids, mask)
    with use(path):
        ours = outputs(make(family, "fastgpt").to(device), ids, mask)
    assert ours.keys() == gold.keys()
    for name, truth in gold.items():
        err, allowed = ((t[name].double() - truth).abs().max() for t in (ours, theirs))
        assert err <= 2.0 * allowed + 1e-5, f"{name}: off by {err:.1e}, eager by {allowed:.1e}"


@pytest.mark.parametrize(
    ("family", "side"),
    [
        (family, side)
        for family in FAMILIES
        for side in ("none", "left", "right")
        if side == "none" or family != SOFTCAP  # which torch's own has not; it is in the next test
    ],
)
def test_loss_logits_and_gradients_are_those_of_eager(family: str, side: str) -> None:
    assert_lawful(family, side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [GPT2, LLAMA, MISTRAL, SOFTCAP])
def test_a_padded_row_is_what_it_is_alone(family: str, side: str) -> None:
    model = make(family, "fastgpt")
    ids, mask = prompts(side)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, keep in enumerate(mask.bool()):
            alone = model(ids[row, keep][None]).logits[0]
            torch.testing.assert_close(logits[row, keep], alone, atol=1e-5, rtol=1e-5)


CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 1.5},
}
CACHES: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    "default": {},
}


def generated(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    torch.manual_seed(2)
    return model.generate(ids, attention_mask=mask, pad_token_id=0, **options)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", [GPT2, LLAMA, MISTRAL, SOFTCAP])
def test_generates_the_tokens_of_eager(family: str, choice: str, cache: str) -> None:
    ids, mask = prompts("left")
    options = {"max_new_tokens": 12} | CHOICES[choice] | CACHES[cache]
    ours = generated(make(family, "fastgpt"), ids, mask, **options)
    assert torch.equal(ours, generated(make(family, "eager"), ids, mask, **options))


def test_generates_with_a_quantised_cache() -> None:
    pytest.importorskip("hqq")
    ids, mask = prompts("left")
    config = {"backend": "hqq", "nbits": 4, "q_group_size": 8, "residual_length": 4,
              "axis_key": 1, "axis_value": 1}  # fmt: skip
    options: dict[str, Any] = {
        "do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True,
        "output_logits": True,
    }  # fmt: skip
    cached = options | {"cache_implementation": "quantized"}
    ours, theirs = (
        generated(make(LLAMA, i), ids, mask, **cached, cache_config=dict(config))
        for i in ("fastgpt", "eager")
    )
    exact = generated(make(LLAMA, "fastgpt"), ids, mask, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    apart, rounded = ((ours.logits[-1] - x.logits[-1]).abs().max() for x in (theirs, exact))
    assert apart < 0.1 * rounded  # by four bits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves the cache to and from a GPU")
@pytest.mark.skipif("ttsem" in sys.modules, reason="ttsem has no streams")
def test_generates_with_an_offloaded_cache() -> None:
    ids, mask = (t.cuda() for t in prompts("left"))
    for cache in ("offloaded", "offloaded_static"):
        options: dict[str, Any] = {"cache_implementation": cache, "max_new_tokens": 16}
        options |= {"do_sample": False, "disable_compile": True}
        ours = generated(make(LLAMA, "fastgpt").cuda(), ids, mask, **options)
        assert torch.equal(ours, generated(make(LLAMA, "eager").cuda(), ids, mask, **options))


@pytest.mark.parametrize("draft", ["a model", "the prompt"])
def test_assisted_decoding_changes_no_token(draft: str) -> None:
    model, ids, mask = make(LLAMA, "fastgpt"), *prompts("none", B=1)
    plain = generated(model, ids, mask, do_sample=False, max_new_tokens=20)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if draft == "a model":
        options = {"assistant_model": make(LLAMA, "fastgpt", num_hidden_layers=1)}
    helped = generated(model, ids, mask, do_sample=False, max_new_tokens=20, **options)
    assert torch.equal(helped, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_attentions_are_filled(family: str) -> None:
    ids, mask = prompts("left")
    ours, theirs = (make(family, i) for i in ("fastgpt", "eager"))
    with torch.no_grad():
        got, want = (m(ids, attention_mask=mask, output_attentions=True) for m in (ours, theirs))
        without = ours(ids, attention_mask=mask)
    assert without.attentions is None
    assert len(got.attentions) == len(want.attentions) == 2
    rows = mask.bool()
    for a, b in zip(got.attentions, want.attentions, strict=True):
        a, b = (w.transpose(1, 2)[rows] for w in (a, b))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a.sum(-1)))
    torch.testing.assert_close(got.logits[rows], without.logits[rows], atol=1e-4, rtol=1e-4)


def test_generate_returns_attentions() -> None:
    ids, mask = prompts("left")
    out = make(LLAMA, "fastgpt").generate(
        ids, attention_mask=mask, max_new_tokens=3, do_sample=False, output_attentions=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert [step[0].shape[-2:] for step in out.attentions] == [(11, 11), (1, 12), (1, 13)]


def test_packed_documents_do_not_see_each_other() -> None:
    """position_ids that start again make documents, and a mask of T numbers, not T x T."""
    lengths = (4, 1, 6)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids, _ = prompts("none", B=1)
    for family in (GPT2, LLAMA, MISTRAL):
        model = make(family, "fastgpt")
        with torch.no_grad():
            packed = model(ids, position_ids=positions, use_cache=False).logits[0]
            alone = [model(part).logits[0] for part in ids.split(lengths, 1)]
        torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)
    x = torch.zeros(2, 11, 32)
    for config, make_mask, window in (
        (LlamaConfig(), create_causal_mask, 1),
        (MistralConfig(sliding_window=4), create_sliding_window_causal_mask, 4),
    ):
        config._attn_implementation = "fastgpt"
        mask = make_mask(config, x, None, None, positions)
        assert mask.shape == (2, 1, window, 11) and mask.dtype == torch.int32
        assert mask[0, 0, 0].tolist() == [0] * 4 + [1] + [2] * 6


def truth(mask: Tensor | None, Tq: int, Tk: int, B: int) -> Tensor:
    """What a mask of one of the four forms says, written out: (B, 1, Tq, Tk)."""
    i, j = torch.arange(Tq)[:, None], torch.arange(Tk)
    if mask is None:
        return (j <= i + Tk - Tq).expand(B, 1, Tq, Tk)
    if mask.dtype == torch.bool:
        return mask.expand(B, 1, Tq, Tk)
    W, n = mask.shape[2:]
    at = i + n - Tq
    see = (j <= at) & ((j > at - W) if W > 1 else True) & (j < n)
    row = torch.nn.functional.pad(mask[:, :, :1], (0, Tk - n))
    return see & row.bool()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(
    ("Tq", "Tk", "offset", "kv_offset"),
    [(7, 7, 0, 0), (1, 7, 6, 0), (3, 7, 4, 0), (7, 12, 0, 0), (3, 12, 4, 0), (1, 12, 4, 0),
     (2, 5, 9, 6), (1, 4, 9, 6), (1, 1, 0, 0)],
)  # fmt: skip
@pytest.mark.parametrize("tensor", [False, True])
def test_a_mask_says_what_sdpas_says(
    Tq: int, Tk: int, offset: int, kv_offset: int, window: int | None, padded: bool, tensor: bool
) -> None:
    f = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    padding = torch.ones(2, offset + Tq, dtype=torch.bool)
    padding[0, : 4 if padded else 0] = False
    common: dict[str, Any] = {
        "batch_size": 2, "q_length": Tq, "kv_length": Tk, "kv_offset": kv_offset,
        "q_offset": torch.tensor(offset) if tensor else offset, "mask_function": f,
        "attention_mask": padding, "local_size": window,
    }  # fmt: skip
    want = sdpa_mask(**common, allow_is_causal_skip=False)
    ours = attention_mask(**common, config=MistralConfig(sliding_window=window))
    assert torch.equal(truth(ours, Tq, Tk, 2), want)
    if not padded and Tk == offset + Tq - kv_offset and window in (None, 100):
        assert ours is None


def test_a_mask_that_is_asked_for_whole_is_whole() -> None:
    """A model may join it with others, or open it to what lies ahead."""
    config = LlamaConfig()
    config._attn_implementation = "fastgpt"
    x, block = torch.zeros(1, 5, 32), torch.tensor([[-1, 0, 0, 0, -1]])
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = create_causal_mask(config, x, None, None, allow_is_causal_skip=False)
    assert mask.dtype == torch.bool and torch.equal(mask[0, 0], causal)
    causal[1:4, 1:4] = True

    def within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (block[b, i] == block[b, j]) & (block[b, i] >= 0)

    mask = create_causal_mask(config, x, None, None, or_mask_function=within)
    assert mask.dtype == torch.bool and torch.equal(mask[0, 0], causal)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_the_users_own(kind: str) -> None:
    ids, _ = prompts("none")
    seen = torch.rand(3, 1, 11, 11) < 0.5
    seen |= torch.eye(11, dtype=torch.bool)
    mask = seen if kind == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    eager = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        got = make(LLAMA, "fastgpt")(ids, attention_mask=mask).logits
        want = make(LLAMA, "eager")(ids, attention_mask=eager).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_an_encoder_sees_both_ways() -> None:
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    ids, mask = prompts("right")
    for kind, more in (("bert", {}), ("modernbert", {"local_attention": 4, "pad_token_id": 0})):
        got, want = _both(
            AutoModel, kind, shape | more, lambda m: m(ids, attention_mask=mask)[0][mask.bool()]
        )
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_an_encoder_and_a_decoder_beside_it() -> None:
    """T5's learned bias of positions, and its attention to another sequence."""
    shape = {
        "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    ids, mask = prompts("right")
    for kind in ("t5", "bart"):
        if kind == "bart":
            shape = {
                "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48, "pad_token_id": 0, "decoder_start_token_id": 0,
            }  # fmt: skip
        labels = ids[:, :7].contiguous()

        def logits(m: Any, labels: Tensor = labels) -> Tensor:
            out = m(ids, attention_mask=mask, labels=labels)
            out.loss.backward()
            return torch.cat([out.logits.flatten(), *(p.grad.flatten() for p in m.parameters())])

        got, want = _both(AutoModelForSeq2SeqLM, kind, shape, logits)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def _both(auto: Any, kind: str, shape: dict[str, Any], call: Any) -> list[Tensor]:
    got = []
    for implementation in ("fastgpt", "eager"):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **shape)
        got.append(call(auto.from_config(config, attn_implementation=implementation).eval()))
    return got


def test_gpt2_with_cross_attention() -> None:
    ids, mask = prompts("right")
    other = torch.randn(3, 5, 32)
    seen = torch.ones(3, 5)
    seen[0, :2] = 0
    got, want = (
        make(GPT2, i, add_cross_attention=True)(
            ids, attention_mask=mask, encoder_hidden_states=other, encoder_attention_mask=seen
        ).logits[mask.bool()]
        for i in ("fastgpt", "eager")
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_dropout_of_attention_weights_in_training() -> None:
    ids, _ = prompts("none")
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = make(GPT2, "fastgpt", attn_pdrop=0.3, **rates).train()
    with torch.no_grad():
        drawn = torch.stack([model(ids).logits for _ in range(3)])
        assert not torch.equal(drawn[0], drawn[1])
        still = model.eval()(ids).logits
    assert torch.equal(still, make(GPT2, "fastgpt", attn_pdrop=0.0, **rates).train()(ids).logits)
    torch.manual_seed(5)
    q, k, v = torch.randn(3, 1, 1, 64, 8).unbind(0)
    layer = model.transformer.h[0].attn
    runs = torch.stack([attention(layer, q, k, v, None, dropout=0.3)[0] for _ in range(2000)])
    mean = attention(layer, q, k, v, None)[0]
    assert (runs.mean(0) - mean).abs().mean() < 0.03 < (runs[0] - mean).abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    ids, mask = prompts("left")
    gold, keep = make(LLAMA, "sdpa").double(), mask.bool()
    with torch.no_grad():
        want = gold(ids, attention_mask=mask).logits[keep]
        with torch.autocast("cpu", dtype):
            ours, theirs = (
                make(LLAMA, i)(ids, attention_mask=mask).logits[keep] for i in ("fastgpt", "sdpa")
            )
    assert ours.dtype == theirs.dtype == dtype
    err, allowed = ((t.double() - want).abs().max() for t in (ours, theirs))
    assert err <= 2.0 * allowed


@pytest.mark.parametrize("cut", [None, "left"])
def test_compiles_whole(cut: str | None) -> None:
    torch._dynamo.reset()
    ids, mask = prompts(cut or "none")
    for family in (GPT2, LLAMA, MISTRAL):
        model = make(family, "fastgpt")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        options = {"attention_mask": None if cut is None else mask, "use_cache": False}
        with torch.no_grad():
            got, want = (m(ids, **options).logits[mask.bool()] for m in (compiled, model))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_trainer_trains_as_with_eager(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    ids, mask = prompts("right", B=8)
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": i.masked_fill(m == 0, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]
    losses = []
    for implementation in ("fastgpt", "eager"):
        model = make(GPT2, implementation, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
        arguments = TrainingArguments(
            str(tmp_path / implementation), per_device_train_batch_size=4, max_steps=4,
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, learning_rate=1e-2,
            gradient_checkpointing=implementation == "fastgpt",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]


def test_from_pretrained_and_a_switch_later(tmp_path: Any) -> None:
    model, (ids, mask) = make(GPT2, "eager"), prompts("left")
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="fastgpt")
    huggingface.register()  # again
    switched = GPT2LMHeadModel.from_pretrained(tmp_path)
    switched.set_attn_implementation("fastgpt")
    with torch.no_grad():
        for m in (loaded, switched):
            assert explain(m, ids, attention_mask=mask)
            got, want = (x(ids, attention_mask=mask).logits[mask.bool()] for x in (m, model))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_refuses_what_it_would_get_wrong() -> None:
    ids, mask = prompts("left")
    x = torch.randn(1, 2, 4, 8)
    layer = torch.nn.Module()
    with pytest.raises(NotImplementedError, match=r"fastgpt.: attention sinks must be absent; got"):
        attention(layer, x, x, x, None, s_aux=torch.zeros(2))
    with pytest.raises(NotImplementedError, match=r"fastgpt.: a paged cache must be absent; got"):
        attention(layer, x, x, x, None, cache=object())
    with pytest.raises(
        TypeError, match=r"attention_mask must be bool or floating; got torch.int64"
    ):
        attention(layer, x, x, x, torch.ones(1, 1, 4, 4, dtype=torch.int64))
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "n_head": 4, "n_layer": 1}
    from transformers import AutoModelForCausalLM

    bloom = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", **shape), attn_implementation="fastgpt"
    )
    with pytest.raises(NotImplementedError, match="AttentionInterface; bloom has one of its own"):
        bloom(ids, attention_mask=mask)


def test_says_that_transformers_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^huggingface.register: transformers must be 5.17 or"):
        huggingface.register()


@pytest.mark.gpu
@pytest.mark.parametrize("family", [GPT2, LLAMA, MISTRAL])
def test_a_model_runs_through_the_kernels(family: str, device: str) -> None:
    """Loss, logits and gradients of left-padded text, through the kernels of attention."""
    assert_lawful(family, "left", device, "triton")


@pytest.mark.gpu
def test_generates_through_the_kernels(device: str) -> None:
    ids, mask = (t.to(device) for t in prompts("left"))
    options = {"do_sample": False, "max_new_tokens": 4, "disable_compile": True}
    for cache in ("dynamic", "static"):
        with use("triton"):
            ours = generated(
                make(MISTRAL, "fastgpt").to(device), ids, mask,
                cache_implementation=cache, **options,
            )  # fmt: skip
        assert torch.equal(ours, generated(make(MISTRAL, "eager").to(device), ids, mask, **options))


@pytest.mark.gpu
def test_explain_tells_that_attentions_were_asked_for(device: str) -> None:
    model, (ids, mask) = make(GPT2, "fastgpt").to(device), (t.to(device) for t in prompts("left"))
    took = explain(model, ids, attention_mask=mask)
    assert [choice.path for choice in took] == ["triton", "triton"]
    took = explain(model, ids, attention_mask=mask, output_attentions=True)
    why = "output_attentions asks for the weights, which the kernel never makes"
    assert [(choice.path, choice.why) for choice in took] == [("reference", why)] * 2
    with use("triton"), pytest.raises(ValueError, match=f"^attention: the triton path.* {why}$"):
        model(ids, attention_mask=mask, output_attentions=True)
