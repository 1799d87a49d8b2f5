"""FastGPTForCausalLM: our GPT in transformers has GPT's numbers, and transformers' own GPT-2's."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, pipeline

from fastgpt import GPT, GPTConfig, generate, huggingface, use
from fastgpt.huggingface import FastGPTConfig, FastGPTForCausalLM

GPT2 = GPTConfig(block_size=40, vocab_size=97, n_layer=2, n_head=4, n_embd=32)
LLAMA = replace(GPT2, variant="llama", bias=False, activation="silu", n_kv_head=2)
CONFIGS = {
    "gpt2": GPT2,
    "without biases": replace(GPT2, bias=False, tied=False, n_kv_head=2),
    "llama": LLAMA,
    "llama, norms of q and k": replace(LLAMA, qk_norm=True, tied=False),
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def made(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, mean=0.5 if p.ndim == 1 else 0.0)
    return model


def wrapped(config: GPTConfig) -> FastGPTForCausalLM:
    return FastGPTForCausalLM.from_gpt(made(config), **ENDS)


def prompts(B: int = 3, T: int = 11) -> tuple[Tensor, Tensor]:
    """Ids and their attention_mask; rows 0 and 1 are shorter, padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (B, T))
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :2] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_logits_and_gradients_are_gpts(name: str) -> None:
    """By GPT itself where nothing else is asked for, and block by block."""
    gpt, ids = made(CONFIGS[name]), prompts()[0]
    want = gpt(ids[:, :-1], ids[:, 1:])
    grads = torch.autograd.grad(want, list(gpt.parameters()))
    for asked in ({}, {"output_hidden_states": True}, {"position_ids": torch.arange(11)[None]}):
        model = FastGPTForCausalLM.from_gpt(gpt)
        out = model(ids, labels=ids, **asked)
        torch.testing.assert_close(out.logits, gpt(ids), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.loss, want)
        got = torch.autograd.grad(out.loss, list(gpt.parameters()))
        for g, w in zip(got, grads, strict=True):
            torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)
        counted = model(ids, labels=ids, num_items_in_batch=60, **asked).loss
        torch.testing.assert_close(counted, want * 30 / 60)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 3
    assert model.train()(ids, labels=ids).logits is None
    assert model.eval()(ids, return_dict=False)[0].shape == (3, 11, 97)
    assert model(ids, logits_to_keep=2).logits.shape == (3, 2, 97)


@pytest.mark.parametrize("name", CONFIGS)
def test_is_saved_and_loaded_by_the_auto_classes(name: str, tmp_path: Path) -> None:
    model, (ids, _) = wrapped(CONFIGS[name]), prompts()
    model.save_pretrained(tmp_path)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(again) is FastGPTForCausalLM and again.gpt.config == CONFIGS[name]
    assert again.config.eos_token_id == 2
    for (n, a), (_, b) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(a, b), n
    assert torch.equal(again(ids).logits, model(ids).logits)
    bare = GPT.from_pretrained(tmp_path)  # and without transformers
    assert bare.config == CONFIGS[name] and torch.equal(bare(ids), model(ids).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is FastGPTConfig and config.gpt() == CONFIGS[name]
    fresh = AutoModelForCausalLM.from_config(config)  # starts as GPT does
    assert 0.015 < fresh.gpt.wte.weight.std() < 0.025
    end = fresh.gpt.h[0].attn.c_proj.weight.std()
    assert 0.008 < end < 0.012
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.gpt.wte.weight.dtype == torch.bfloat16


def test_wrapping_shares_the_weights() -> None:
    gpt = made(GPT2)
    model = FastGPTForCausalLM.from_gpt(gpt)
    assert model.gpt is gpt and model.device.type == "cpu" and model.dtype == torch.float32
    assert all(p is q for p, q in zip(model.parameters(), gpt.parameters(), strict=True))
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_row_is_what_it_is_alone(name: str) -> None:
    model, (ids, mask) = wrapped(CONFIGS[name]), prompts()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, keep in enumerate(mask.bool()):
            alone = model(ids[row, keep][None]).logits[0]
            torch.testing.assert_close(logits[row, keep], alone, atol=1e-4, rtol=1e-4)


def test_packed_documents_do_not_see_each_other() -> None:
    for config in (GPT2, LLAMA):
        model, ids = wrapped(config), prompts()[0][2:]
        lengths = (4, 1, 6)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        with torch.no_grad():
            got = model(ids, position_ids=positions, use_cache=False).logits[0]
            want = torch.cat([model(part).logits[0] for part in ids.split(lengths, 1)])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_is_that_of_our_own_generate(name: str, cache: str | None) -> None:
    """Each left-padded row by transformers, and that row alone by ours."""
    model, (ids, mask) = wrapped(CONFIGS[name]), prompts()
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    text = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, **options
    )
    for row, keep in enumerate(mask.bool()):
        alone = generate(model.gpt, ids[row, keep][None], 12, temperature=0.0)
        assert torch.equal(text[row, 11:], alone[0, -12:])


CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_generates_what_transformers_own_gpt2_does(choice: str, tmp_path: Path) -> None:
    gpt = made(GPT2)
    gpt.save_pretrained(tmp_path)
    ids, mask = prompts()
    if choice == "prompt lookup":
        ids, mask = ids[2:], mask[2:]
    texts = []
    for model in (FastGPTForCausalLM.from_gpt(gpt), GPT2LMHeadModel.from_pretrained(tmp_path)):
        torch.manual_seed(3)
        ends = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
        options = {"attention_mask": mask, "max_new_tokens": 14} | ends | CHOICES[choice]
        texts.append(model.generate(ids, **options))
    assert torch.equal(*texts)


def test_assisted_decoding_by_a_smaller_gpt() -> None:
    model, draft = wrapped(GPT2), wrapped(replace(GPT2, n_layer=1))
    ids, mask = (t[2:] for t in prompts())
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False}
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), want)


def test_attentions_are_weights() -> None:
    model, (ids, mask) = wrapped(LLAMA), prompts()
    out = model(ids, attention_mask=mask, output_attentions=True)
    assert [w.shape for w in out.attentions] == [(3, 4, 11, 11)] * 2
    for w in out.attentions:
        seen = w.transpose(1, 2)[mask.bool()]
        torch.testing.assert_close(seen.sum(-1), torch.ones(seen.shape[:2]))
        assert w[0, :, :, :5].abs().max() == 0.0


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_gradient_checkpointing_changes_no_gradient(config: GPTConfig) -> None:
    ids, mask = prompts()
    grads, calls = [], []
    for on in (False, True):
        model = wrapped(replace(config, dropout=0.2)).train()
        if on:
            model.gradient_checkpointing_enable()
            checkpoint = model._gradient_checkpointing_func

            def counted(*args: Any, f: Any = checkpoint) -> Any:
                calls.append(args)
                return f(*args)

            model._gradient_checkpointing_func = counted
        torch.manual_seed(4)
        loss = model(ids, attention_mask=mask, labels=ids).loss
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert len(calls) == 2  # one a block
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_trainer_trains_saves_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    ids, mask = prompts(8)
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": i.masked_fill(m == 0, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]

    def trainer(steps: int) -> Any:
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=steps, logging_steps=1, report_to=[], save_steps=3, use_cpu=True,
            learning_rate=1e-2, lr_scheduler_type="constant", per_device_eval_batch_size=8,
        )  # fmt: skip
        return Trainer(wrapped(GPT2), arguments, train_dataset=rows, eval_dataset=rows)

    whole = trainer(6)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < 0.8 * before
    again = trainer(6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_pipeline_generates_text() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        padding_side="left",
    )  # fmt: skip
    model = wrapped(LLAMA)
    pipe = pipeline("text-generation", model=model, tokenizer=fast, device="cpu")
    options = {"batch_size": 2, "max_new_tokens": 5, "do_sample": False}
    texts = pipe(["w5 w6", "w7 w8 w9 w10"], return_tensors=True, **options)
    for prompt, text in zip(([5, 6], [7, 8, 9, 10]), texts, strict=True):
        want = generate(model.gpt, torch.tensor([prompt]), 5, temperature=0.0)
        assert text[0]["generated_token_ids"][-want.shape[1] :] == want[0].tolist()
    assert "w5 w6" in pipe("w5 w6", **options)[0]["generated_text"]


def test_the_vocabulary_grows() -> None:
    for config in (GPT2, replace(GPT2, tied=False)):
        model, (ids, _) = wrapped(config), prompts()
        before = model(ids).logits
        model.resize_token_embeddings(99, mean_resizing=False)
        assert model.gpt.config.vocab_size == model.config.vocab_size == 99
        after = model(ids.masked_fill(ids == 0, 98)).logits
        assert after.shape[-1] == 99
        rows = (ids != 0).all(-1)
        torch.testing.assert_close(after[rows][..., :97], before[rows])


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    model, (ids, _) = wrapped(LLAMA), prompts()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        got, want = (m(ids, use_cache=False).logits for m in (compiled, model))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_errors() -> None:
    model = wrapped(GPT2)
    with pytest.raises(ValueError, match=r"one of input_ids and inputs_embeds$"):
        model()
    with pytest.raises(ValueError, match=r"^GPT: the context is at most block_size 40 tokens"):
        model(torch.ones(1, 41, dtype=torch.int64), use_cache=False)
    with pytest.raises(ValueError, match=r"the context is at most block_size 40 .* 30 after 20"):
        cache = model(torch.ones(1, 20, dtype=torch.int64), use_cache=True).past_key_values
        model(torch.ones(1, 30, dtype=torch.int64), past_key_values=cache)
    with pytest.raises(ValueError, match=r"^GPTConfig: variant must be one of gpt2, llama"):
        FastGPTConfig(variant="bert")
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = huggingface.Nothing


@pytest.mark.gpu
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_runs_through_the_kernels(config: GPTConfig, device: str) -> None:
    model, (ids, mask) = wrapped(config).to(device), (t.to(device) for t in prompts())
    with use("reference"):
        want = model(ids, attention_mask=mask, labels=ids).loss
        grads = torch.autograd.grad(want, list(model.parameters()))
    with use("triton"):
        got = model(ids, attention_mask=mask, labels=ids).loss
        for g, w in zip(torch.autograd.grad(got, list(model.parameters())), grads, strict=True):
            torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(got, want)
    assert copy.deepcopy(model)(ids).logits.shape == (3, 11, 97)
