"""Pruning: what goes is what matters least, what is left computes on, and training mends it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import GPT, GPTConfig, compress
from fastgpt.cli import main
from fastgpt.data import Part
from fastgpt.lora import LoraConfig, add
from fastgpt.prune import heal, importance, norms, prune, windows
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    TrainConfig,
    load,
)
from fastgpt.train.checkpoint import Checkpointer, export
from fastgpt.train.run import train
from tests.test_compress import TEXT

SMALL = GPTConfig(block_size=16, vocab_size=97, n_layer=2, n_head=4, n_embd=64)
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "no bias": {"bias": False},
    "llama": {
        "variant": "llama", "bias": None, "activation": None, "n_kv_head": 2, "n_inner": 96,
        "qk_norm": True,
    },
}  # fmt: skip


def model_of(shape: str = "gpt2", **more: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(replace(SMALL, **(SHAPES[shape] | more))).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2, mean=0.5 if p.ndim == 1 else 0.0)
    return model


def rows(n: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(0, 97, (n, 17), generator=torch.Generator().manual_seed(seed))


def gated(model: GPT, x: Tensor, gates: dict[tuple[int, str], Tensor]) -> Tensor:
    """The loss with what enters the layers that end branches multiplied element by element."""
    hooks = []
    for layer, block in enumerate(model.h):
        ends = {"attn": block.attn.c_proj}
        ends["mlp"] = block.mlp.down_proj if model.config.llama else block.mlp.c_proj
        for name, end in ends.items():
            gate = gates.get((layer, name))
            if gate is not None:

                def scale(m: Any, args: Any, gate: Tensor = gate) -> Any:
                    return (args[0] * gate,)

                hooks.append(end.register_forward_pre_hook(scale))
    try:
        return model(x[:, :-1], x[:, 1:])
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("shape", SHAPES)
def test_importance_is_the_gradient_of_gates(shape: str) -> None:
    """Michel et al.'s masks of heads, and a gate a column, by autograd itself."""
    model, text = model_of(shape), rows()
    c = model.config
    got = importance(model, text)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for layer in range(2):
        want_heads, want_columns = torch.zeros(c.kv_heads), torch.zeros(c.inner)
        for row in text:
            heads = torch.ones(c.kv_heads, requires_grad=True)
            columns = torch.ones(c.inner, requires_grad=True)
            wide = heads.repeat_interleave(c.n_head // c.kv_heads * c.head_dim)
            loss = gated(model, row[None], {(layer, "attn"): wide, (layer, "mlp"): columns})
            for total, g in zip(
                (want_heads, want_columns), torch.autograd.grad(loss, (heads, columns)), strict=True
            ):
                total += g.abs() / len(text)
        torch.testing.assert_close(got[layer][0], want_heads, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(got[layer][1], want_columns, atol=1e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("by_text", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_computes_as_if_the_rest_were_zero(shape: str, by_text: bool) -> None:
    model, whole, text = model_of(shape), model_of(shape), rows()
    c = model.config
    scores = importance(whole, text) if by_text else norms(whole)
    gates = {}
    for layer, (heads, columns) in enumerate(scores):
        kept = torch.zeros(c.kv_heads).scatter(0, heads.topk(c.kv_heads // 2).indices, 1.0)
        gates[layer, "attn"] = kept.repeat_interleave(c.n_head // c.kv_heads * c.head_dim)
        n = -(-c.inner // 2 // 32) * 32
        gates[layer, "mlp"] = torch.zeros(c.inner).scatter(0, columns.topk(n).indices, 1.0)
    x = rows(5, seed=2)
    assert prune(model, 0.5, text if by_text else None) is model
    torch.testing.assert_close(model(x[:, :-1], x[:, 1:]), gated(whole, x, gates))
    now = model.config
    assert (now.n_head, now.kv_heads, now.head_dim) == (2, c.kv_heads // 2, 16)
    assert now.inner == -(-c.inner // 2 // 32) * 32
    fresh = {name: t.shape for name, t in GPT(now).state_dict().items()}
    assert fresh == {name: t.shape for name, t in model.state_dict().items()}
    assert model.num_params() < 0.65 * whole.num_params()


def test_less_is_lost_by_text_than_at_random() -> None:
    """Of a model whose second half of heads and columns does nothing, that half goes."""
    model = model_of()
    with torch.no_grad():
        block: Any
        for block in model.h:
            block.attn.c_proj.weight[:, 32:] *= 1e-3
            block.mlp.c_proj.weight[:, 128:] *= 1e-3
    x = rows(8, seed=3)
    with torch.no_grad():
        before = model(x[:, :-1], x[:, 1:]).item()
        after = prune(model, 0.5, rows())(x[:, :-1], x[:, 1:]).item()
    assert after == pytest.approx(before, rel=2e-3)


def test_shares_may_differ_and_something_is_left() -> None:
    model = prune(model_of("llama"), 0.9, heads=0.0)
    assert (model.config.n_head, model.config.inner, model.config.n_head_dim) == (4, 32, None)
    model = prune(model_of("llama"), heads=0.99, inner=0.0)
    assert (model.config.n_head, model.config.kv_heads, model.config.inner) == (2, 1, 96)
    assert model(rows()[:, :-1]).isfinite().all()


def test_lora_is_merged() -> None:
    model = add(model_of(), LoraConfig(rank=2))
    assert not any("lora" in name for name in prune(model, 0.5).state_dict())


@pytest.mark.parametrize("to", [None, "int8", "int4"])
def test_a_pruned_model_is_saved_generates_and_is_quantised(to: str | None, tmp_path: Path) -> None:
    for shape in ("gpt2", "llama"):
        model = compress(model_of(shape), "prune=0.5", rows())
        if to is not None:
            compress(model, to)
        ids = rows(2)[:, :4]
        want = fastgpt.generate(model, ids, 10, temperature=0.0)
        model.save_pretrained(tmp_path / shape, own=True)
        again = GPT.from_pretrained(tmp_path / shape)
        assert again.config == model.config
        assert torch.equal(fastgpt.generate(again, ids, 10, temperature=0.0), want)


def test_hugging_faces_gpt2_has_no_such_heads_and_our_class_has(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    from fastgpt import huggingface

    model = prune(model_of(), 0.5)
    with pytest.raises(ValueError, match=r"^save_pretrained: .* n_head x n_head_dim 64; got 32$"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, own=True)
    huggingface.register()
    there = AutoModelForCausalLM.from_pretrained(tmp_path)
    x = rows()[:, :-1]
    with torch.no_grad():
        torch.testing.assert_close(there(x).logits, model(x), atol=1e-4, rtol=1e-4)
    # With all its heads GPT-2 holds it, and Llama's layout holds it anyway.
    for name, fits in (
        ("gpt2", prune(model_of(), heads=0.0, inner=0.5)),
        ("llama", prune(model_of("llama", qk_norm=False), 0.5)),
    ):
        fits.save_pretrained(tmp_path / name)
        there = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(there(x).logits, fits(x), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 272)


def trained(tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(0)
    model = GPT(replace(SMALL, vocab_size=272, block_size=80))
    return heal(model, Part.of([tokenizer.encode(TEXT)]), 60, lr=3e-3, rows=2)


def test_the_command_prunes_heals_and_quantises(
    tokenizer: Tokenizer, tmp_path: Path, capsys: Any
) -> None:
    model = trained(tokenizer)
    run, out, text = tmp_path / "run", tmp_path / "out", tmp_path / "text.txt"
    Checkpointer(run, CheckpointConfig(asynchronous=False)).save(60, model, tokenizer)
    text.write_text(TEXT)
    (tmp_path / "more.txt").write_text(TEXT + TEXT[::-1])
    command = ["compress", str(run), "--to", "prune=0.5", "--text", str(text)]
    more = ["--train-text", str(tmp_path / "more.txt"), "--heal-steps", "30", "--heal-lr", "3e-3"]
    assert main([*command, *more, "--to", "int8", "--out", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    _, *lines, written = said.out.splitlines()
    assert [" ".join(line.split("  ")[0].split()) for line in lines] == [
        "float32", "prune=0.5", "prune=0.5, 30 steps", "int8"
    ]  # fmt: skip
    assert written == f"written: {out}" and said.err.count("heal: step ") == 10
    losses = [float(line.split(" MB")[2].split()[0]) for line in lines]
    assert losses[0] < losses[1] and losses[2] < losses[1]
    sizes = [float(line.split("  ", 1)[1].split()[0]) for line in lines]
    assert sizes[1] < 0.7 * sizes[0] and sizes[3] < 0.4 * sizes[1]
    small, _ = load(out)
    assert (small.config.n_head, small.config.quantized) == (2, "int8")
    assert main(["generate", "Rings", "--model", str(out), "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("Rings")

    # Pruned alone it goes on training, and Hugging Face's export says what it cannot hold.
    assert main([*command, "--out", str(tmp_path / "pruned"), "--device", "cpu"]) == 0
    config = TrainConfig(
        out=str(tmp_path / "tuned"), steps=2, device="cpu", batch=BatchConfig(rows=2),
        model=ModelConfig(init=str(tmp_path / "pruned")), eval=EvalConfig(every=0, windows=1),
        data=DataConfig(files=(str(tmp_path / "more.txt"),), deduplicate="none", held_out=0.3),
    )  # fmt: skip
    assert train(config).model.config.n_head == 2
    with pytest.raises(ValueError, match=r"^save_pretrained: .* must have n_head x n_head_dim 64"):
        export(tmp_path / "tuned", tmp_path / "hf")


def test_the_command_on_a_folder_and_a_corpus(
    tokenizer: Tokenizer, tmp_path: Path, capsys: Any
) -> None:
    from fastgpt.data import prepare

    (tmp_path / "text.txt").write_text("\n\n".join(f"{n}. {TEXT[n:][:90]}" for n in range(200)))
    tokenizer.save(tmp_path / "tokenizer.json")
    data = DataConfig(
        files=(str(tmp_path / "text.txt"),), tokenizer=str(tmp_path / "tokenizer.json")
    )
    prepare(data, tmp_path / "corpus")
    folder, out = tmp_path / "hf", tmp_path / "out"
    GPT(replace(SMALL, vocab_size=272)).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    command = ["compress", str(folder), "--to", "prune=0.5", "--device", "cpu", "--out", str(out)]
    assert main([*command, "--text", str(tmp_path / "corpus"), "--heal-steps", "2"]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"written: {out}, in a layout that fastgpt alone reads\n")
    assert "prune=0.5, 2 steps" in said
    assert GPT.from_pretrained(out).config.n_head_dim == 16
    assert (out / "tokenizer.json").is_file()
    text = str(tmp_path / "text.txt")
    for bad, message in (
        (["--to", "prune=0.5"], "compress: to may be given twice, first prune=SHARE "),
        (["--heal-steps", "3"], "compress: heal-steps need prune=SHARE, and train-text or "),
        (["--heal-steps", "-3"], "compress: heal-steps must not be negative; got -3"),
        (["--text", text, "--train-text", text], "compress: text must be another than "),
        (["--train-text", str(tmp_path / "none")], "file: "),
    ):
        assert main([*command, *bad]) == 2
        error = capsys.readouterr().err
        assert error.startswith(message) and error.count("\n") == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: prune(model_of(), 1.0), r"prune: a share must lie in \[0, 1\); got 1.0"),
        (lambda: prune(compress(model_of(), "int8")), r"prune: .* float weights; it has int8"),
        (lambda: prune(model_of(), 0.5, rows()[0]), r"prune: rows must be .* 16; got \(17,\)"),
        (lambda: compress(model_of(), "prune=2"), r"compress: to must be .*; got 'prune=2'"),
        (lambda: compress(model_of(), "prune"), r"compress: to must be .*; got 'prune'"),
        (lambda: windows(Part.of([[1, 2]]), 16), r"prune: the text .* 16 tokens; got 2"),
        (lambda: heal(model_of(), Part.of([[1, 2]]), 1), r"heal: the text .* 16 tokens; got 2"),
        (lambda: heal(compress(model_of(), "int8"), Part.of([[1]]), 1), r"heal: .*; it has int8"),
    ],
)
def test_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}$"):
        call()


def test_windows_are_from_all_over_the_text() -> None:
    got = windows(Part.of([list(range(1000))]), 4)
    assert got.shape == (64, 5) and got[:, 0].tolist() == [n * 249 // 64 * 4 for n in range(64)]


def test_documents_may_be_kept_apart() -> None:
    """Two short ones fill no window of tokens end to end, and are learned as they are."""
    model, text = model_of(), Part.of([[1, 2, 3, 4], [5, 6, 7]])
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(ids[:, :-1], ids[:, 1:]).item()
    heal(model, text, 5, lr=1e-2, rows=1, packing="documents")
    assert model(ids[:, :-1], ids[:, 1:]).item() < before
