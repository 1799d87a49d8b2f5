"""fastgpt compress: loss kept, files that load again everywhere, a table that says what is so."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastgpt
from fastgpt import GPT, GPTConfig, compress
from fastgpt.cli import main
from fastgpt.compress import measure, table
from fastgpt.lora import LoraConfig, add, merge
from fastgpt.quantized import Int4Linear, Int8Embedding, Int8Linear
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import CheckpointConfig, load
from fastgpt.train.checkpoint import Checkpointer, export

TEXT = "Rings and steps and bells. " * 40 + "A bell that rings is a bell that steps. " * 40


def tiny(**shape: Any) -> GPT:
    torch.manual_seed(0)
    sizes = {"block_size": 96, "vocab_size": 272, "n_layer": 2, "n_head": 2, "n_embd": 64}
    return GPT(GPTConfig(**{**sizes, **shape}))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 272)


@pytest.fixture(scope="module")
def trained(tokenizer: Tokenizer) -> Callable[[], GPT]:
    """A model that has learned the text, anew each time."""
    model = tiny()
    ids = torch.tensor(tokenizer.encode(TEXT))
    optimizer = model.configure_optimizer(lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        at = torch.randint(0, len(ids) - 33, (8,), generator=draw)
        rows = torch.stack([ids[i : i + 33] for i in at])
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()

    def again() -> GPT:
        made = tiny()
        made.load_state_dict(state)
        return made.eval()

    return again


@pytest.mark.parametrize("to, most", [("int8", 0.01), ("int4", 0.05)])
def test_the_loss_is_kept(
    trained: Callable[[], GPT], tokenizer: Tokenizer, to: str, most: float
) -> None:
    ids = torch.tensor(tokenizer.encode(TEXT))
    before = measure(trained(), ids)
    after = measure(compress(trained(), to), ids)
    assert before.loss is not None and after.loss is not None
    assert before.loss < 1.5  # of 5.6 at first
    assert abs(after.loss / before.loss - 1.0) < most
    assert after.weights < (0.35 if to == "int8" else 0.3) * before.weights
    assert after.memory > after.weights


@torch.no_grad()
def test_the_loss_of_real_weights_is_kept() -> None:
    """Of genera as the model itself draws them, since none that it was not trained on are here."""
    if (spec := find_spec("mgm")) is None or spec.origin is None:
        pytest.skip("microformer-mgm is not installed, whose wheel carries the weights")
    microformer = Path(spec.origin).parent / "resources" / "general_model"
    model = GPT.from_pretrained(microformer)
    ids = fastgpt.generate(model, torch.full((8, 1), 2), 47, temperature=1.0, seed=0)
    before = model(ids[:, :-1], ids[:, 1:]).item()
    assert before < 6.0  # of 9.2 for one that knows nothing
    size = sum(t.nbytes for t in model.state_dict().values())
    for to, most, share in (("int8", 0.01, 0.27), ("int4", 0.05, 0.2)):
        small = compress(GPT.from_pretrained(microformer), to)
        assert abs(small(ids[:, :-1], ids[:, 1:]).item() / before - 1.0) < most
        assert sum(t.nbytes for t in small.state_dict().values()) < share * size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_what_is_compressed(to: str, tied: bool) -> None:
    model = compress(tiny(tied=tied), to)
    inner = Int8Linear if to == "int8" else Int4Linear
    kinds = {n: type(m) for n, m in model.named_modules()}
    assert kinds["wte"] is Int8Embedding
    assert kinds["h.0.attn.c_attn"] is kinds["h.1.mlp.c_proj"] is inner
    assert tied or kinds["lm_head"] is Int8Linear
    assert model.config.quantized == to
    assert not model.training
    assert model.num_params() == tiny(tied=tied).num_params()
    assert model.num_params(embeddings=False) == tiny(tied=tied).num_params(embeddings=False)


def test_the_loss_is_that_of_the_logits() -> None:
    model = compress(tiny(), "int8")
    ids = torch.randint(0, 272, (3, 20))
    targets = torch.randint(0, 272, (3, 20))
    targets[1, 4:] = -100
    with torch.no_grad():
        want = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        assert torch.allclose(model(ids, targets), want)
    assert isinstance(model.wte, Int8Embedding)
    assert torch.equal(model.output_weight, model.wte.dequantized())


def test_measures_are_of_the_whole_text(trained: Callable[[], GPT], tokenizer: Tokenizer) -> None:
    model, ids = trained(), torch.tensor(tokenizer.encode(TEXT))[:150]
    got = measure(model, ids, [len(b) for b in tokenizer.token_bytes])
    with torch.no_grad():
        parts = [F.cross_entropy(model(x[None])[0], y, reduction="sum")
                 for x, y in ((ids[:96], ids[1:97]), (ids[96:149], ids[97:]))]  # fmt: skip
    nats = float(sum(parts))
    assert got.loss == pytest.approx(nats / 149, rel=1e-5)
    length = len(tokenizer.decode(ids[1:].tolist()).encode())
    assert got.bits_per_byte == pytest.approx(nats / math.log(2.0) / length, rel=1e-5)
    assert got.tokens_per_second is not None and got.tokens_per_second > 0.0
    assert measure(tiny(block_size=64)).tokens_per_second is None


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_saved_model_is_the_model(to: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model, ids = compress(tiny(), to), torch.randint(0, 272, (2, 9))
    want = fastgpt.generate(model, ids, 20, temperature=0.0)
    model.save_pretrained(tmp_path / "hf")
    Checkpointer(tmp_path / "run", CheckpointConfig(asynchronous=False)).save(3, model, tokenizer)
    for made in (GPT.from_pretrained(tmp_path / "hf"), load(tmp_path / "run")[0]):
        assert made.config.quantized == to
        for name, t in model.state_dict().items():
            assert torch.equal(made.state_dict()[name], t), name
        assert torch.equal(fastgpt.generate(made, ids, 20, temperature=0.0), want)
    with pytest.raises(ValueError, match=f"export: the weights must be floats.*; got {to};"):
        export(tmp_path / "run", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    half = GPT.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.wte.weight.dtype == torch.int8 and half.wte.scale.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(half(ids).float(), model(ids), atol=0.05, rtol=0.05)


def test_lora_is_merged() -> None:
    model = add(tiny(), LoraConfig(rank=2))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    want = compress(merge(add_again(model)), "int8").state_dict()
    got = compress(model, "int8").state_dict()
    assert all(torch.equal(got[n], t) for n, t in want.items())


def add_again(model: GPT) -> GPT:
    other = add(tiny(), LoraConfig(rank=2))
    other.load_state_dict(model.state_dict())
    return other


def test_transformers_is_told_no() -> None:
    pytest.importorskip("transformers")
    from fastgpt import huggingface

    with pytest.raises(ValueError, match=r"^FastGPTForCausalLM: .* not be quantised.*; got int8$"):
        huggingface.FastGPTForCausalLM.from_gpt(compress(tiny(), "int8"))


@pytest.mark.parametrize(
    "make, to, message",
    [
        (tiny, "int2", r"compress: to must be int8, int4 or prune=.*; got 'int2'"),
        (lambda: compress(tiny(), "int8"), "int4", r"compress: .* float weights; it has int8"),
        (lambda: tiny(n_embd=48), "int4", r"Int4Linear: in_features must .*; got 48 and \d+"),
    ],
)
def test_refuses(make: Callable[[], GPT], to: str, message: str) -> None:
    model = make()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"^{message}$"):
        compress(model, to)
    assert dict(model.named_modules()) == before


def test_config_knows_the_kinds() -> None:
    with pytest.raises(ValueError, match=r"^GPTConfig: quantized must be None, .*; got 'int3'$"):
        GPTConfig(quantized="int3")


def test_the_command(
    trained: Callable[[], GPT], tokenizer: Tokenizer, tmp_path: Path, capsys: Any
) -> None:
    run, out, text = tmp_path / "run", tmp_path / "small", tmp_path / "text.txt"
    Checkpointer(run, CheckpointConfig(asynchronous=False)).save(60, trained(), tokenizer)
    text.write_text(TEXT)
    command = ["compress", str(run), "--to", "int8", "--text", str(text)]
    assert main([*command, "--out", str(out)]) == 0
    head, before, after, said = capsys.readouterr().out.splitlines()
    assert head.split() == ["weights", "memory", "nats/token", "bits/byte", "tokens/s"]
    assert before.split()[0] == "float32" and after.split()[0] == "int8"
    assert said == f"written: {out}"
    model, _ = load(out)
    assert model.config.quantized == "int8"
    assert [p.name for p in out.iterdir()] == ["step-00000060"]
    assert main(["generate", "Rings", "--model", str(out), "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("Rings")

    trained().save_pretrained(tmp_path / "hf")
    assert main(["compress", str(tmp_path / "hf"), "--to", "int4", "--out", str(out)]) == 0
    assert " - " in capsys.readouterr().out
    assert GPT.from_pretrained(out).config.quantized == "int4"
    for bad, message in (
        ([str(run), "--to", "int8", "--out", str(run)], "compress: out must be another folder"),
        ([str(run), "--to", "int3"], "compress: to must be int8, int4 or prune=SHARE "),
        ([str(tmp_path / "hf"), "--to", "int8", "--text", str(text)], "compress: a text needs "),
        ([str(tmp_path / "none"), "--to", "int8"], "from_pretrained: "),
    ):
        assert main(["compress", *bad]) == 2
        error = capsys.readouterr().err
        assert error.startswith(message) and error.count("\n") == 1


def test_a_table_without_a_text_has_no_loss() -> None:
    rows = {"float32": measure(tiny()), "int8": measure(compress(tiny(), "int8"))}
    assert table(rows).splitlines()[1].count(" - ") == 2
