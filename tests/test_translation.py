"""examples/translation on a small language, whose adjectives stand behind their nouns."""

import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch

from examples.translation.__main__ import main
from examples.translation.dictionary import Dictionary, ibm_model_1
from examples.translation.pairs import Pair, divide, parts, unlike, verses
from examples.translation.recipe import Recipe
from fastgpt import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer

SYLLABLES = [c + v for c in "bdfglmnprst" for v in "aeiou"]


def language(size: int = 900) -> list[Pair]:
    """Sentences of two nouns with an adjective each; ten are a chapter."""
    draw = random.Random(0)
    new = ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)]
    draw.shuffle(new)
    words = list(zip(new[:100], new[100:200], strict=True))
    nouns, adjectives, verbs = words[:30], words[30:50], words[50:58]
    made = []
    for n in range(size):
        (a, a2), (c, c2) = draw.sample(nouns, 2)
        (b, b2), (d, d2), (v, v2) = (draw.choice(x) for x in (adjectives, adjectives, verbs))
        source, target = f"El {a} {b} {v} el {c} {d}.", f"The {b2} {a2} {v2} the {d2} {c2}."
        made.append(Pair(f"Book {n // 10}", source, target))
    return made


def test_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From pairs to a table: LoRA on a model that was drawn, which it makes a better one."""
    base, out = tmp_path / "base", tmp_path / "out"
    tokenizer = Tokenizer.train([text for pair in language() for text in pair], 600)
    torch.manual_seed(0)
    shape = replace(GPTConfig.preset("tiny-llama"), n_layer=2, n_embd=64, vocab_size=600)
    GPT(shape).save_pretrained(base)
    tokenizer.save(base / "tokenizer.json")
    recipe = Recipe(out, str(base), steps=20, rows=16, block_size=96, lr=2e-2, chapters=(1, 3))
    recipe.prepare(language)
    assert recipe.train()
    results = recipe.evaluate()
    assert results == json.loads((out / "results.json").read_text(encoding="utf-8"))

    texts, scores = results["translations"], results["scores"]
    assert len(texts) == 25 and [*texts[0]][2:] == ["word by word", "as it came", "tuned"]
    for name in ("word by word", "tuned"):
        ours = sacrebleu.corpus_chrf([t[name] for t in texts], [[t["target"] for t in texts]]).score
        assert scores[name]["chrF2"]["score"] == pytest.approx(ours)
    assert scores["tuned"]["chrF2"]["score"] > 2 * scores["as it came"]["chrF2"]["score"]
    assert "nrefs:1" in capsys.readouterr().out

    argv = ["--out", str(out), "--prompt", texts[0]["source"]]
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"Word by word: {texts[0]['word by word']}"


@pytest.mark.skipif(shutil.which("mod2imp") is not None, reason="libsword-utils is installed")
def test_missing_verses_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--init", "none"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "apt-get install libsword-utils sword-text-sparv" in said


def test_verses() -> None:
    imp = """$$$Genesis 1:0
<chapter n="1"/>
$$$Genesis 1:1
<title>The beginning</title> <w savlm="strong:H7225">EN el</w> <w>principio</w><w>crió</w>,
$$$Genesis 1:2
He said, <q>“Noah’s ark.”</q><note n="1">or box</note>
$$$Genesis 1:3

"""
    assert verses(imp) == {
        "Genesis 1:1": "En el principio crió,", "Genesis 1:2": "He said, Noah's ark."
    }  # fmt: skip


def test_parts() -> None:
    whole = Pair(
        "Job 1", "Dijo el rey: ¿Quién eres? Y calló.", "The king said: Who? He fell silent."
    )
    assert [part.source for part in parts(whole)] == ["Dijo el rey:", "¿Quién eres?", "Y calló."]
    assert [part.target for part in parts(whole)] == ["The king said:", "Who?", "He fell silent."]
    for other in ("The king said, Who? He fell silent.", "Said: Who? And he said no word all day."):
        assert parts(whole._replace(target=other)) == [whole._replace(target=other)]


def test_what_is_held_out_was_not_seen() -> None:
    pairs = [Pair(f"Job {n % 20}", f"texto {n}", f"text {n}") for n in range(100)]
    training, dev, test = divide(pairs, (2, 3))
    chapters = [{pair.chapter for pair in part} for part in (training, dev, test)]
    assert [len(names) for names in chapters] == [15, 2, 3]
    assert sorted(training + dev + test) == sorted(pairs) and len(set.union(*chapters)) == 20

    known = [Pair("", "En el principio crió Dios los cielos.", "God made the heavens at first.")]
    near = Pair("", "En el principio crió Dios la tierra.", "First of all he made dry land.")
    turned = Pair("", "Al comienzo hizo todo.", "And god made the heavens; at first.")
    far = Pair("", "Y crió Dios la tierra.", "The heavens fell.")
    assert unlike([near, far, turned], known) == [far]


def test_dictionary() -> None:
    texts = [
        ("la casa roja", "the red house"), ("la casa", "the house"), ("la mesa", "the table"),
        ("mesa roja", "red table"), ("la Roma roja", "the red Rome"),
    ]  # fmt: skip
    learned = Dictionary.learn([Pair("", *text) for text in texts])
    assert learned.of == {
        "la": "the",
        "casa": "house",
        "mesa": "table",
        "roja": "red",
        "roma": "Rome",
    }
    assert learned.translate("¿La casa de Roma?") == "The house de Rome?"


def test_ibm_model_1() -> None:
    """One step from a uniform p, by hand: each target word's count is shared among the sources."""
    keys, p = ibm_model_1([[0, 1], [0]], [[0, 1], [0]], size=2, rounds=1)
    assert keys.tolist() == [0, 1, 2, 3]  # f * 2 + e
    # f = 0: e = 0 counts 1/2 + 1, e = 1 counts 1/2; f = 1: 1/2 each.
    np.testing.assert_allclose(p, [0.75, 0.25, 0.5, 0.5])
