"""The recipe of writing, small: the n-gram model against its formula, and all of it in seconds."""

import hashlib
import io
import json
import math
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from examples.packages import texts
from examples.writing.__main__ import main
from examples.writing.ngram import KneserNey
from fastgpt import GPT, GPTConfig
from fastgpt.cli import main as fastgpt
from fastgpt.data import Corpus
from fastgpt.tokenizer import Tokenizer

V = 7


def plain(ids: list[int], order: int, history: tuple[int, ...], w: int) -> float:
    """p(w | history) by the formulas, gram by gram."""
    if order == 0:
        return 1.0 / V
    counts: Counter[tuple[int, ...]] = Counter(
        tuple(ids[i : i + ORDER]) for i in range(len(ids) - ORDER + 1)
    )
    for n in range(ORDER - 1, order - 1, -1):
        before: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for gram in counts:
            before[gram[1:]].add(gram[0])
        counts = Counter({gram: len(found) for gram, found in before.items()})
        assert all(len(gram) == n for gram in counts)
    n1, n2, n3, n4 = (max(1, sum(c == k for c in counts.values())) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    D = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    D = [min(max(d, 0.0), k) for k, d in enumerate(D)]
    h = history[len(history) - order + 1 :]
    mine = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == h}
    shorter = plain(ids, order - 1, history, w)
    if not mine:
        return shorter
    total = sum(mine.values())
    kept = mine.get(w, 0) - D[min(mine.get(w, 0), 3)]
    return kept / total + sum(D[min(c, 3)] for c in mine.values()) / total * shorter


ORDER = 3


def test_kneser_ney_is_its_formula_and_sums_to_one() -> None:
    rng = np.random.default_rng(0)
    ids = (rng.random(300) ** 2 * (V - 1)).astype(np.int64)  # the last id never comes
    model = KneserNey(ids, V, ORDER)
    for history in ((0, 1), (5, 5), (6, 6), (3, 0)):
        p = model.next([2, *history])
        assert p.sum() == pytest.approx(1.0, abs=1e-12)
        assert p.min() > 0.0
        want = [plain(ids.tolist(), ORDER, history, w) for w in range(V)]
        np.testing.assert_allclose(p, want, rtol=1e-12)
    text = [4, 0, 1, 6, 2]
    each = [model.next(text[:i])[text[i]] for i in range(ORDER - 1, len(text))]
    np.testing.assert_allclose(model.bits(np.array(text)), -np.log2(each))
    with pytest.raises(ValueError, match=r"^ngram: .*; got 300\^9 and 300 tokens$"):
        KneserNey(ids, 300, 9)


def test_texts_of_a_package(tmp_path: Path) -> None:
    file = tmp_path / "works-1.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name in ("works-1/texts/b.txt", "works-1/texts/a.txt", "works-1/other/c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 5
            archive.addfile(info, io.BytesIO(b"\xef\xbb\xbf" + name[-5].encode() + b"."))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    found = list(texts("works==1", digest, "/texts/", ".txt", tmp_path))
    assert found == [("a", "a."), ("b", "b.")]
    with pytest.raises(ValueError, match=f"must have SHA-256 0; got {digest}$"):
        list(texts("works==1", "0", "/texts/", ".txt", tmp_path))


def test_all_of_it_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    works = [(f"work{n}", t[:3000]) for n, t in enumerate(sorted(topics.values(), key=len)[-12:])]
    monkeypatch.setattr("examples.writing.__main__.texts", lambda *told: works)
    tokenizer = Tokenizer.train([text for _, text in works], 400)
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, tokenizer.vocab_size, 2, 2, 32, variant="llama"))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    out = tmp_path / "run"
    results = main(["--out", str(out), "--init", str(tmp_path / "model"), "--steps", "12"])
    assert json.loads((out / "results.json").read_text()) == results

    held_out = Corpus.open(out / "corpus").held_out
    ids = torch.from_numpy(held_out.read(0, len(held_out))[0]).long()
    ids = ids[: (len(ids) - 1) // 256 * 256 + 1]
    x, y = ids[:-1].view(-1, 256), ids[1:].view(-1, 256)
    with torch.no_grad():
        bits = float(model(x, y)) / math.log(2.0) * y.numel()
    size = sum(len(tokenizer.token_bytes[i]) for i in y.flatten().tolist())
    assert results["the model as it came"] == pytest.approx(bits / size, rel=2e-3)
    assert results["fine-tuned"] < results["the model as it came"] - 1e-3
    assert results["Kneser-Ney, 4-grams"] < results["token frequencies"] - 0.3
    printed = capsys.readouterr().out
    assert printed.count("--- fine-tuned") == printed.count("--- Kneser-Ney") == 3
    assert fastgpt(["generate", "the", "--model", str(out), "--temperature", "0",
                    "--max-new-tokens", "3"]) == 0  # fmt: skip
