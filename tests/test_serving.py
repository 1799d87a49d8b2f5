"""What is exported runs elsewhere: the same logits and greedy ids in transformers, CTranslate2 and
llama.cpp, of a model trained here and of real weights."""

import ctypes
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig, generate
from fastgpt.cli import main
from fastgpt.data import Part
from fastgpt.gguf_file import write_gguf
from fastgpt.prune import heal, prune
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import CheckpointConfig
from fastgpt.train.checkpoint import Checkpointer, export
from tests.test_compress import TEXT
from tests.test_pretrained_gpt2 import GREEDY, microformer  # noqa: F401

PROMPT, NEW = "Rings and steps and", 12
Logits = Callable[[list[int]], Tensor]  # of all positions, (T, V)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a GPT-2 that has learned a text."""
    tokenizer = Tokenizer.train([TEXT], 272)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2,
                          n_embd=32))  # fmt: skip
    heal(model, Part.of([tokenizer.encode(TEXT)]), 60, lr=1e-2, rows=4)
    folder = tmp_path_factory.mktemp("run")
    Checkpointer(folder, CheckpointConfig(asynchronous=False)).save(60, model, tokenizer)
    return folder


def same(folder: Path, ids: list[int], engine: Logits, atol: float) -> list[int]:
    """Compare logits and NEW greedy ids with what `fastgpt` makes of the folder; return these."""
    model = GPT.from_pretrained(folder)
    with torch.no_grad():
        want = model(torch.tensor([ids]))[0]
    torch.testing.assert_close(engine(ids), want, atol=atol, rtol=1e-3)
    text: list[int] = generate(model, torch.tensor([ids]), NEW, temperature=0.0)[0].tolist()
    there = engine(text[:-1])[len(ids) - 1 :].argmax(-1)  # each the likeliest after those before
    assert there.tolist() == text[len(ids) :]
    return text


def test_transformers(run: Path, tmp_path: Path, microformer: Path) -> None:  # noqa: F811
    transformers = pytest.importorskip("transformers")
    export(run, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompts = {tmp_path: tokenizer(PROMPT).input_ids, microformer: GREEDY[:20]}
    assert prompts[tmp_path] == Tokenizer.load(tmp_path / "tokenizer.json").encode(PROMPT)
    for folder, ids in prompts.items():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)

        @torch.no_grad()
        def logits(x: list[int], model: Any = model) -> Tensor:
            made: Tensor = model(torch.tensor([x])).logits[0]
            return made

        text = same(folder, ids, logits, 1e-4)
        made = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert made[0].tolist() == text


def test_ctranslate2(run: Path, tmp_path: Path, microformer: Path) -> None:  # noqa: F811
    engine = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    transformers = pytest.importorskip("transformers")
    from ctranslate2.converters import TransformersConverter
    from ctranslate2.converters.transformers import GPT2Loader

    def logits(folder: Path) -> Logits:
        made = engine.Generator(str(folder), device="cpu", intra_threads=1)
        return lambda ids: torch.from_numpy(
            np.array(made.forward_batch([ids], return_log_probs=False))[0]
        )

    export(run, tmp_path / "hf")
    TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "ct2"))
    ids = Tokenizer.load(tmp_path / "hf" / "tokenizer.json").encode(PROMPT)
    text = same(tmp_path / "hf", ids, logits(tmp_path / "ct2"), 1e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    (made,) = engine.Generator(str(tmp_path / "ct2"), device="cpu").generate_batch(
        [tokenizer.convert_ids_to_tokens(ids)], max_length=NEW, min_length=NEW, sampling_topk=1,
        include_prompt_in_result=False,
    )  # fmt: skip
    assert made.sequences_ids[0] == text[len(ids) :]

    # microformer-mgm has no tokenizer that the converter knows: its ids are named here.
    GPT.from_pretrained(microformer).save_pretrained(tmp_path / "genera")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "genera")
    loader = GPT2Loader()
    spec = loader.get_model_spec(theirs)
    words = [f"<{n}>" for n in range(theirs.config.vocab_size)]
    loader.set_vocabulary(spec, words)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = words[0]
    spec.validate()
    spec.optimize(quantization=None)
    (tmp_path / "genera_ct2").mkdir()
    spec.save(str(tmp_path / "genera_ct2"))
    same(tmp_path / "genera", GREEDY[:20], logits(tmp_path / "genera_ct2"), 1e-3)


class Llama:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path) -> None:
        self.llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
        self._quiet = self.llama.llama_log_callback(lambda level, text, data: None)
        self.llama.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self.llama.llama_backend_init()
        asked = self.llama.llama_model_default_params()
        self.model = self.llama.llama_model_load_from_file(str(file).encode(), asked)
        assert self.model, "llama.cpp must load the file"
        self.vocab = self.llama.llama_model_get_vocab(self.model)

    def encode(self, text: str) -> list[int]:
        room = (ctypes.c_int32 * 64)()
        n = self.llama.llama_tokenize(
            self.vocab, text.encode(), len(text.encode()), room, 64, True, False
        )
        return list(room[:n])

    def logits(self, ids: list[int]) -> Tensor:
        shape = self.llama.llama_context_default_params()
        shape.n_ctx = shape.n_batch = shape.n_ubatch = 64
        shape.n_threads = shape.n_threads_batch = 1
        context = self.llama.llama_init_from_model(self.model, shape)
        batch = self.llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert self.llama.llama_decode(context, batch) == 0
        V = self.llama.llama_vocab_n_tokens(self.vocab)
        rows = [np.ctypeslib.as_array(self.llama.llama_get_logits_ith(context, i), (V,)).copy()
                for i in range(len(ids))]  # fmt: skip
        self.llama.llama_free(context)
        return torch.from_numpy(np.stack(rows))


def test_llama_cpp(run: Path, tmp_path: Path, microformer: Path, capsys: Any) -> None:  # noqa: F811
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    file = tmp_path / "trained.gguf"
    assert main(["export", "--checkpoint", str(run), "--out", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: weights and tokenizer\n"
    export(run, tmp_path / "hf")
    tokenizer, model = Tokenizer.load(tmp_path / "hf" / "tokenizer.json"), Llama(file)
    for text in (PROMPT, "A bell  that's 12 ringing,\n\nstep; 白日"):
        assert model.encode(text) == tokenizer.encode(text)
    same(tmp_path / "hf", tokenizer.encode(PROMPT), model.logits, 0.05)  # its gelu is a table

    theirs = GPT.from_pretrained(microformer)
    write_gguf(tmp_path / "genera.gguf", theirs.state_dict(), theirs.config)
    same(microformer, GREEDY[:20], Llama(tmp_path / "genera.gguf").logits, 0.05)

    narrow = GPT(GPTConfig(block_size=64, vocab_size=97, n_layer=2, n_head=4, n_embd=64,
                           variant="llama", n_kv_head=2, n_inner=96))  # fmt: skip
    prune(narrow, 0.5).save_pretrained(tmp_path / "llama")
    write_gguf(tmp_path / "llama.gguf", narrow.state_dict(), narrow.config)
    with torch.no_grad():
        got = Llama(tmp_path / "llama.gguf").logits([5, 6, 7, 80])
        torch.testing.assert_close(got, narrow(torch.tensor([[5, 6, 7, 80]]))[0], atol=1e-3, rtol=0)


def test_a_llama_file_comes_back(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    config = GPTConfig(block_size=32, vocab_size=300, n_layer=1, n_head=2, n_embd=64,
                       variant="llama", n_kv_head=1, n_head_dim=16, n_inner=96,
                       tied=False)  # fmt: skip
    model, tokenizer = GPT(config), Tokenizer.train([TEXT], 280)
    file = tmp_path / "llama.gguf"
    write_gguf(file, model.state_dict(), config, tokenizer=tokenizer.to_json())
    again = GPT.from_pretrained(file)
    assert replace(again.config, norm_eps=config.norm_eps) == config  # it is float32 there
    for name, t in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name
    import gguf

    fields = gguf.GGUFReader(file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    vocabulary = json.loads(tokenizer.to_json())["model"]["vocab"]
    assert tokens[:280] == sorted(vocabulary, key=vocabulary.get) and len(tokens) == 300
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos


@pytest.mark.parametrize(
    "change, precision, message",
    [
        ({"activation": "relu"}, "float32", "gguf: .* activation 'gelu_tanh'; got 'relu'"),
        ({"n_head_dim": 16}, "float32", "gguf: .* n_head x n_head_dim 64; got 32"),
        ({"window": 8}, "float32", "gguf: .* window None; got 8"),
        ({}, "int3", "gguf: precision must be one of .*; got 'int3'"),
    ],
    ids=str,
)
def test_refuses_what_llama_cpp_lacks(
    change: dict[str, Any], precision: str, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    small = GPTConfig(block_size=16, vocab_size=97, n_layer=1, n_head=2, n_embd=64)
    config = replace(small, **change)
    with pytest.raises(ValueError, match=rf"^{message}$"):
        write_gguf(tmp_path / "model.gguf", GPT(config).state_dict(), config, precision)
    assert not (tmp_path / "model.gguf").exists()
