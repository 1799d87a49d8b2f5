"""A sentence followed through a GPT: each step's numbers as text."""

import unicodedata
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import GPT, capture_attention, generate
from fastgpt.interpret import Attention
from fastgpt.tokenizer import Tokenizer

FEW = 6  # numbers shown of a vector


def through(
    model: GPT, tokenizer: Tokenizer, sentence: str, prompt: str, others: Sequence[str]
) -> dict[str, str]:
    """The blocks of the page, by name; numbers are those of the model and of its own kernels."""
    ids = tokenizer.encode(sentence)
    words = [shown(tokenizer, id) for id in ids]
    idx = torch.tensor([ids])
    with torch.no_grad(), capture_attention(model, rows=None, keep="qkvo") as captured:
        model(idx)
    return {
        "tokens": table(["t", "id", "token"], [[t, ids[t], words[t]] for t in range(len(ids))]),
        "embedding": embedding(model, ids, words),
        "weights": weights(captured[0], words),
        "sum": weighted_sum(captured[0], words),
        "ffn": feed_forward(model, idx, words[-1]),
        "output": output(model, tokenizer, prompt),
        "text": "\n".join(
            f"{start} -> {continued(model, tokenizer, start)}" for start in (prompt, *others)
        ),
    }


def embedding(model: GPT, ids: list[int], words: list[str]) -> str:
    assert model.wpe is not None
    lines = []
    for t, id in enumerate(ids[:3]):
        row, place = model.wte.weight[id], model.wpe.weight[t]
        lines += [
            [words[t] if n == 0 else "", name, *numbers(x)]
            for n, (name, x) in enumerate(
                ((f"wte[{id}]", row), (f"wpe[{t}]", place), (f"h[{t}]", row + place))
            )
        ]
    return table(["", "", *range(FEW)], lines)


def weights(layer: Attention, words: list[str]) -> str:
    """Of head 0: a few numbers of q and k, all scores, all weights and what a row sums to."""
    assert layer.q is not None and layer.k is not None
    q, k, w = layer.q[0, 0], layer.k[0, 0], layer.weights[0, 0]
    T = len(words)
    lines = [[words[t], *numbers(q[t]), "", *numbers(k[t])] for t in range(T)]
    vectors = table(["", *(f"q{n}" for n in range(FEW)), "", *(f"k{n}" for n in range(FEW))], lines)
    scores = q @ k.T * layer.scale
    rows, parts = [], []
    for i in range(T):
        rows.append([words[i], *(f"{scores[i, j]:.2f}" if j <= i else "·" for j in range(T))])
        seen = [f"{w[i, j]:.3f}" if j <= i else "·" for j in range(T)]
        parts.append([words[i], *seen, f"{w[i].sum():.3f}"])
    return "\n\n".join((
        vectors, "q kᵀ / √d\n" + table(["", *words], rows),
        "softmax\n" + table(["", *words, "Σ"], parts),
    ))  # fmt: skip


def weighted_sum(layer: Attention, words: list[str]) -> str:
    assert layer.v is not None and layer.o is not None
    w, v, o = layer.weights[0, 0, -1], layer.v[0, 0], layer.o[0, 0, -1]
    lines = [[f"{w[j]:.3f} v({word})", *numbers(w[j] * v[j])] for j, word in enumerate(words)]
    total = (w[:, None] * v).sum(0)
    torch.testing.assert_close(total, o, atol=1e-5, rtol=1e-4)  # what the model itself made
    return table(["", *range(FEW)], [*lines, ["o", *numbers(total)]])


@torch.no_grad()
def feed_forward(model: GPT, idx: Tensor, word: str) -> str:
    """Of the last position in the first layer: six of the units inside."""
    kept: list[Tensor] = []
    hook = model.get_submodule("h.0.mlp.c_fc").register_forward_hook(
        lambda *call: kept.append(call[2])
    )
    try:
        model(idx)
    finally:
        hook.remove()
    z = kept[0][0, -1, :FEW]
    lines = [
        ["z = W₁ x + b₁", *numbers(z)],
        ["gelu(z)", *numbers(F.gelu(z, approximate="tanh"))],
        ["relu(z)", *numbers(F.relu(z))],
    ]
    return table([word, *range(FEW)], lines)


@torch.no_grad()
def output(model: GPT, tokenizer: Tokenizer, prompt: str, n: int = 8) -> str:
    logits = model(torch.tensor([tokenizer.encode(prompt)]))[0, -1]
    p = logits.softmax(-1)
    top = p.topk(n)
    lines = [
        [shown(tokenizer, int(id)), f"{logits[id]:.2f}", f"{x:.4f}", "█" * round(30 * float(x))]
        for x, id in zip(top.values, top.indices, strict=True)
    ]
    rest = 1.0 - float(top.values.sum())
    lines += [[f"+ {len(p) - n}", "", f"{rest:.4f}", "█" * round(30 * rest)]]
    return table(["", "logit", "p", ""], [*lines, ["Σ", "", f"{float(p.sum()):.4f}", ""]])


def continued(model: GPT, tokenizer: Tokenizer, start: str) -> str:
    """Up to the end of the sentence, the likeliest token each time."""
    ids = torch.tensor([tokenizer.encode(start)])
    text = tokenizer.decode(generate(model, ids, 24, temperature=0.0)[0, ids.shape[1] :].tolist())
    for n, c in enumerate(text):
        if c in "。！？\n":
            return text[: n + 1].strip()
    return text.rstrip("\ufffd") + " …"


def shown(tokenizer: Tokenizer, id: int) -> str:
    """A token's text; the bytes of one that is a part of a character."""
    raw = tokenizer.token_bytes[id]
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return raw.hex(" ")
    return text if text.isprintable() and text.strip() else repr(text)[1:-1]


def numbers(x: Tensor) -> list[str]:
    return [f"{value:.3f}" for value in x[:FEW].tolist()]


def table(head: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    """Columns flush right but for the first; a Chinese character is as wide as two others."""
    rows = [[str(cell) for cell in row] for row in (head, *lines)]
    wide = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell + " " * (w - width(cell)) if n == 0 or cell.startswith("█")
            else " " * (w - width(cell)) + cell
            for n, (cell, w) in enumerate(zip(row, wide, strict=True))
        ).rstrip()
        for row in rows
    )  # fmt: skip


def width(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
