"""fastgpt explain: what it says of a text, in words, numbers, plots and a page."""

import base64
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt import capture_attention, compress
from fastgpt.cli import main
from fastgpt.interpret import explain_text, head_ablation, page
from fastgpt.interpret.pieces import label, labels
from fastgpt.interpret.terminal import pad, short, width
from tests.explained import PROMPT, TEXT, explanation, tiny

pytest.importorskip("captum")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as transformers would save it."""
    path = tmp_path_factory.mktemp("tiny")
    model, tokenizer = tiny()
    model.save_pretrained(path)
    tokenizer.save(path / "tokenizer.json")
    return path


# ------------------------------------------------------------------ tokens in print


def test_a_character_across_tokens_says_which_part_a_token_holds() -> None:
    _, tokenizer = tiny()
    text = "人工智能 🌍\n"
    shown = labels(tokenizer, tokenizer.encode(text))
    parts = [f"🌍 {n}/4" for n in range(1, 5)]
    at = shown.index(parts[0])
    assert shown[at : at + 4] == parts
    assert "".join(shown[:at]) == "人工智能␣" and "".join(shown[at + 4 :]) == "⏎"
    byte = tokenizer.token_bytes.index(b"\xe4")
    assert label(tokenizer, byte) == "‹E4›"
    assert labels(tokenizer, [byte]) == ["‹E4›"], "no whole text"
    assert label(tokenizer, tokenizer.token_bytes.index(b"\x07")) == "\\x07"
    assert tokenizer.eos is not None
    assert labels(tokenizer, [tokenizer.eos])[0] == "<|endoftext|>"
    assert label(tokenizer, 10_000) == "‹10000›"


def test_columns_of_wide_characters() -> None:
    assert width("人a") == 3 and pad("人", 4) == "人  " and pad("人", 4, right=True) == "  人"
    assert short("人工智能", 5) == "人工…" and short("model", 5) == "model"


# ------------------------------------------------------------------ the numbers


def test_an_explanation_agrees_with_the_model() -> None:
    model, tokenizer = tiny()
    found = explanation()
    idx = torch.tensor([tokenizer.encode(PROMPT)])
    T = idx.shape[1]
    with torch.no_grad(), capture_attention(model, rows=None) as captured:
        p = model(idx)[0, -1].softmax(-1)
    assert found.target.id == int(p.argmax()) and found.follows[0] == found.target
    assert [c.p for c in found.follows] == pytest.approx(p.topk(10).values.tolist(), rel=1e-5)
    assert found.weights.shape == (2, 2, T, T)
    torch.testing.assert_close(found.weights[1], captured[1].weights[0])
    torch.testing.assert_close(found.looks[0], captured[0].weights[0, :, -1].mean(0))
    assert len(found.lens) == 3 and found.lens[-1].rank == 1
    assert found.lens[-1].p == pytest.approx(found.target.p)
    torch.testing.assert_close(found.lost, head_ablation(model, idx, found.target.id))
    layer, head = found.strongest(1)[0]
    assert found.lost[layer, head] == found.lost.max()


def test_what_is_asked_for() -> None:
    model, tokenizer = tiny()
    found = explain_text(model, tokenizer, TEXT[:20], [-1], [1], [2, -1], target="人")
    assert (found.layers, found.heads, found.rows) == ((1,), (1,), (2, len(found.ids) - 1))
    assert found.weights.shape == (1, 1, 2, len(found.ids))
    assert found.target.text == "人" and found.lens[-1].rank > 1
    assert found.lens[-1].p == found.target.p
    assert found.attribution.value == pytest.approx(np.log(found.target.p), rel=1e-5)


# ------------------------------------------------------------------ the command


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["explain", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_report_on_a_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, PROMPT, "--checkpoint", folder, "--device", "cpu")
    assert (code, err) == (0, "")
    found = explanation()
    assert out.startswith(f"{len(found.tokens)} tokens; 2 layers, 2 heads, width 32, ")
    for title in ("What comes next", "Where position", "What it would say", "Heads that matter"):
        assert title in out
    assert re.search(
        rf"^  {re.escape(found.target.text)} +{100 * found.target.p:.1f}%  █", out, re.M
    )
    assert re.search(r"^  \d+ +🌍 2/4 ", out, re.M)
    layer, head = found.strongest(1)[0]
    assert f"layer {layer} head {head}  " in out
    # Wide characters take two columns, so that what follows stands below each other.
    lines = out.split("log p(")[1].splitlines()[2 : 2 + len(found.tokens)]
    assert len({width(line) for line in lines}) == 1


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, PROMPT, "--checkpoint", folder, "--json", "--layers", "0", "--rows=-1"
    )
    told: dict[str, Any] = json.loads(out)
    assert code == 0 and told["text"] == PROMPT
    assert np.array(told["attention"]["weights"]).shape == (1, 2, 1, len(told["tokens"]))
    assert np.sum(told["attention"]["weights"], -1) == pytest.approx(1.0, abs=1e-5)
    assert len(told["lens"]) == 3 and np.array(told["heads"]["nats_lost"]).shape == (2, 2)
    direct = told["direct"]
    parts = [direct["token"], direct["position"], direct["norm_bias"]]
    parts += direct["attention_bias"] + direct["mlp"]
    total = sum(parts) + np.sum(told["heads"]["direct_logit"])
    assert total == pytest.approx(direct["logit"], abs=1e-3)


def test_plots_and_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, plots = tmp_path / "page.html", tmp_path / "new" / "plots"
    code, out, _ = run(
        capsys, "人工 $x$", "--checkpoint", folder, "--html", file, "--png", plots, "--heads", 1
    )
    assert code == 0 and out.splitlines()[-1].startswith(f"written: {file}, ")
    for name in ("attention", "tokens", "lens", "heads"):
        head = (plots / f"{name}.png").read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", head[16:])) > 200
    assert "<canvas" in file.read_text(encoding="utf-8")


def test_a_checkpoint_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastgpt.train import CheckpointConfig
    from fastgpt.train.checkpoint import Checkpointer

    Checkpointer(tmp_path, CheckpointConfig(asynchronous=False)).save(1, *tiny())
    code, out, err = run(capsys, "looks", "--checkpoint", tmp_path)
    assert (code, err) == (0, "") and "What comes next" in out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["", "--checkpoint", "F"], "the text must be 1 to 64 tokens; got 0"),
        (["人" * 99, "--checkpoint", "F"], "the text must be 1 to 64 tokens; got "),
        (["a", "--checkpoint", "F", "--layers", "2"], "layers must lie in 0 to 1"),
        (["a", "--checkpoint", "F", "--heads", "x"], "--heads must be integers with commas"),
        (["a", "--checkpoint", "F", "--rows", "1"], "rows must lie in 0 to 0"),
        (["a", "--checkpoint", "F", "--target", "a model"], "the target must be one token; 'a mo"),
        (["a", "--checkpoint", "F/none"], "from_pretrained: "),
        (["a", "--checkpoint", "F", "--html", "F/none/page.html"], "none"),
        (["a"], "the following arguments are required: --checkpoint"),
    ],
)
def test_bad_input_gives_one_line(
    argv: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *(arg.replace("F", str(folder)) for arg in argv))
    assert code == 2 and said in err and err.count("\n") == 1


def test_more_that_is_refused(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny()
    with pytest.raises(ValueError, match="at most 10 attention weights are kept; got"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastgpt.interpret.explanation.MOST_WEIGHTS", 10)
            explain_text(model, tokenizer, "looks at words")
    small = compress(type(model)(model.config), "int8")
    with pytest.raises(
        ValueError, match="must have float weights, as before compress; it has int8"
    ):
        explain_text(small, tokenizer, "looks")
    model.save_pretrained(tmp_path)
    assert main(["explain", "a", "--checkpoint", str(tmp_path)]) == 2


# ------------------------------------------------------------------ the page's data


def test_the_page_holds_the_weights() -> None:
    found = explanation()
    told = page.data(found)
    flat = np.frombuffer(base64.b64decode(told["weights"]), "<u2") / page.FULL
    T, at = len(found.tokens), 0
    for n in range(4):
        for row in range(T):
            want = found.weights.flatten(0, 1)[n, row, : row + 1].numpy()
            assert np.abs(flat[at : at + row + 1] - want).max() < 1e-5
            at += row + 1
    assert at == len(flat)


def test_what_a_token_holds_is_no_markup() -> None:
    text = page.render(explanation())
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "<b id" not in text and "/*data*/" not in text
    told = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.S)[0])
    assert told["text"] == PROMPT
    assert not re.search(r"https?://|url\(|@import", text)
