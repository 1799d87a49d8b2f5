"""All that is to be said of why a GPT goes on with a text as it does, as plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.interpret.attribution import METHODS, Attribution, token_attribution
from fastgpt.interpret.capture import Chosen, capture_attention, chosen
from fastgpt.interpret.heads import DirectLogits, direct_logits, head_ablation
from fastgpt.interpret.lens import lens_by_layer
from fastgpt.interpret.pieces import label, labels
from fastgpt.interpret.rollout import attention_rollout
from fastgpt.model import GPT
from fastgpt.ops import backend
from fastgpt.tokenizer import Tokenizer

LONGEST = 512  # tokens of a text
MOST_WEIGHTS = 4_000_000
TOP = 10


@dataclass(frozen=True)
class Candidate:
    """A token that may follow, and its probability."""

    id: int
    text: str
    p: float


@dataclass(frozen=True)
class Lens:
    """What the model would say after a layer; layer 0 is the embedding.

    Attributes:
        top: the likeliest tokens after the text.
        p, rank: of the target there; rank 1 is the likeliest.
        each: the likeliest token after every position.
    """

    top: Sequence[Candidate]
    p: float
    rank: int
    each: Sequence[Candidate]


@dataclass(frozen=True)
class Explanation:
    """Of a text of T tokens and the token that is asked about.

    Attributes:
        text: as it was given.
        tokens, ids: T of them.
        model: its facts in words.
        target: the token whose probability is explained.
        follows: the likeliest tokens after the text.
        layers, heads, rows: those that weights holds, of n_layer and n_head.
        weights: (layers, heads, rows, T) attention weights.
        rollout: (T, T), see attention_rollout.
        looks: (n_layer, T), the last position's weights, mean over the heads.
        lens: n_layer + 1 of them.
        attribution: see token_attribution.
        lost: (n_layer, n_head), see head_ablation.
        direct: see direct_logits.
    """

    text: str
    tokens: Sequence[str]
    ids: Sequence[int]
    model: str
    target: Candidate
    follows: Sequence[Candidate]
    layers: Sequence[int]
    heads: Sequence[int]
    rows: Sequence[int]
    weights: Tensor
    rollout: Tensor
    looks: Tensor
    lens: Sequence[Lens]
    attribution: Attribution
    lost: Tensor
    direct: DirectLogits

    def strongest(self, n: int) -> list[tuple[int, int]]:
        """The n heads, as (layer, head), without which most is lost."""
        order = self.lost.flatten().argsort(descending=True)[:n].tolist()
        H = self.lost.shape[1]
        return [(at // H, at % H) for at in order]

    def as_json(self) -> dict[str, Any]:
        """For json.dumps: numbers, strings, lists; indices are places in tokens, from 0."""

        def told(found: Sequence[Candidate]) -> list[dict[str, Any]]:
            return [vars(candidate) for candidate in found]

        a, d = self.attribution, self.direct
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "ids": list(self.ids),
            "model": self.model,
            "target": vars(self.target),
            "next": told(self.follows),
            "attention": {
                "layers": list(self.layers), "heads": list(self.heads), "rows": list(self.rows),
                "weights": self.weights.tolist(),
            },
            "rollout": self.rollout[-1].tolist(),
            "lens": [
                {"top": told(lens.top), "p": lens.p, "rank": lens.rank} for lens in self.lens
            ],
            "attribution": {
                "method": METHODS[0], "scores": a.scores.tolist(), "value": a.value,
                "baseline": a.baseline, "error": a.error, "steps": a.steps,
            },
            "heads": {"nats_lost": self.lost.tolist(), "direct_logit": d.heads.tolist()},
            "direct": {
                "logit": d.logit, "token": d.token, "position": d.position,
                "attention_bias": d.attention_bias.tolist(), "mlp": d.mlp.tolist(),
                "norm_bias": d.norm_bias,
            },
        }  # fmt: skip


def explain_text(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    layers: Chosen = None,
    heads: Chosen = None,
    rows: Chosen = None,
    target: str | None = None,
) -> Explanation:
    """Run all of it on one text.

    Args:
        model: of float weights.
        tokenizer: its own.
        text: at least one token, at most 512 and the model's block_size.
        layers, heads, rows: whose attention weights to keep, as in capture_attention; all if None.
        target: text of the token to explain; None is the likeliest.

    Raises:
        ValueError: a text that is empty or too long, a target that is not one token, a layer, head
            or row that is not there, too many weights, or a quantised model.
        ImportError: the package captum is not installed.
    """
    c = model.config
    ids = tokenizer.encode(text)
    most = min(LONGEST, c.block_size)
    if not 1 <= len(ids) <= most:
        raise ValueError(f"explain: the text must be 1 to {most} tokens; got {len(ids)}")
    if c.quantized is not None:
        raise ValueError(
            f"explain: the model must have float weights, as before compress; it has {c.quantized}"
        )
    kept_layers, kept_heads, kept_rows = (
        chosen(name, asked, n)
        for name, asked, n in (
            ("layers", layers, c.n_layer), ("heads", heads, c.n_head), ("rows", rows, len(ids))
        )
    )  # fmt: skip
    count = len(ids) * len(kept_layers) * len(kept_heads) * len(kept_rows)
    if count > MOST_WEIGHTS:
        raise ValueError(
            f"explain: at most {MOST_WEIGHTS:,} attention weights are kept; got {count:,}; choose"
            " with layers, heads or rows"
        )
    idx = torch.tensor([ids], device=model.ln_f.weight.device)
    lens, goal = _lens(model, tokenizer, idx, _one_token(tokenizer, target))
    with torch.no_grad(), capture_attention(model, rows=None) as captured:
        model.eval()(idx)
    weights = [captured[layer].weights[0].float().cpu() for layer in range(c.n_layer)]
    return Explanation(
        text=text, tokens=labels(tokenizer, ids), ids=ids, model=_facts(model), target=goal,
        follows=lens[-1].top, layers=kept_layers, heads=kept_heads, rows=kept_rows,
        weights=torch.stack(
            [weights[layer][list(kept_heads)][:, list(kept_rows)] for layer in kept_layers]
        ),
        rollout=attention_rollout(captured)[0].float().cpu(),
        looks=torch.stack([w[:, -1].mean(0) for w in weights]),
        lens=lens,
        attribution=token_attribution(model, idx, goal.id),
        lost=head_ablation(model, idx, goal.id),
        direct=direct_logits(model, idx, goal.id),
    )  # fmt: skip


def _facts(model: GPT) -> str:
    c, weight = model.config, model.ln_f.weight
    path = "Triton kernels" if backend.kernels_run(weight) else "plain PyTorch"
    return (
        f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, {model.num_params():,} parameters"
        f" in {str(weight.dtype).removeprefix('torch.')}, on {weight.device} by {path}"
    )


def _one_token(tokenizer: Tokenizer, target: str | None) -> int | None:
    if target is None:
        return None
    ids = tokenizer.encode(target)
    if len(ids) != 1:
        got = " ".join(labels(tokenizer, ids)) or "none"
        raise ValueError(f"explain: the target must be one token; {target!r} is {len(ids)}: {got}")
    return ids[0]


def _lens(
    model: GPT, tokenizer: Tokenizer, idx: Tensor, target: int | None
) -> tuple[list[Lens], Candidate]:
    """The lens of every layer, and the target, which is the last one's best if it was not given."""

    def named(p: Tensor, id: Tensor) -> Candidate:
        return Candidate(int(id), label(tokenizer, int(id)), float(p))

    found = []
    for logits in lens_by_layer(model, idx, None):
        p = logits[0].to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)  # (T, V)
        best, likeliest = p.topk(min(TOP, p.shape[1]), dim=-1)
        found.append((p[-1].cpu(), best.cpu(), likeliest.cpu()))
    goal = int(found[-1][2][-1, 0]) if target is None else target
    made = [
        Lens(
            top=[named(p, id) for p, id in zip(best[-1], likeliest[-1], strict=True)],
            p=float(last[goal]),
            rank=int((last > last[goal]).sum()) + 1,
            each=[named(p, id) for p, id in zip(best[:, 0], likeliest[:, 0], strict=True)],
        )
        for last, best, likeliest in found
    ]
    return made, Candidate(goal, label(tokenizer, goal), made[-1].p)
