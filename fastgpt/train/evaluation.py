"""How well a model predicts held-out text, and what it writes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt.data import Sampler
from fastgpt.generation.tokens import generate
from fastgpt.model import GPT, IGNORE
from fastgpt.parallel import Layout
from fastgpt.tokenizer import Tokenizer
from fastgpt.train.device import autocast

ROWS = 16


@dataclass(frozen=True)
class EvalConfig:
    """When held-out text is predicted, and how much of it; and what is written on the way.

    Attributes:
        every: steps between evaluations; 0 for one at the end only.
        windows: the most windows of held-out text, from all over it; 0 for all.
        samples: texts that the model writes after each evaluation.
        prompt: what they continue; none begins a document.
        sample_tokens: the most tokens of each.
    """

    every: int = 200
    windows: int = 512
    samples: int = 0
    prompt: str = ""
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("every", "windows", "samples"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"eval: {name} must not be negative; got {value}")
        if self.sample_tokens < 1:
            raise ValueError(f"eval: sample_tokens must be at least 1; got {self.sample_tokens}")


@dataclass(frozen=True)
class Evaluation:
    """How well held-out text is predicted.

    Attributes:
        loss: mean over tokens that take part, in nats.
        perplexity: exp(loss).
        bits_per_byte: bits of all those tokens over the bytes of UTF-8 that they stand for.
    """

    loss: float
    perplexity: float
    bits_per_byte: float


@torch.no_grad()
def evaluate(
    model: GPT, sampler: Sampler, token_bytes: Tensor, layout: Layout, dtype: torch.dtype,
    most: int = 0,
) -> Evaluation:  # fmt: skip
    """Predict rows of held-out text that do not overlap; the ranks share them.

    Args:
        model: as the layout gave it; in evaluation mode within.
        sampler: of the held-out part.
        token_bytes: (vocab_size,) int64, bytes of UTF-8 that an id stands for.
        layout: the ranks, which all call this.
        dtype: of matrix products.
        most: rows at the most, from all over the text; 0 for all.
    """
    training = model.training
    model.eval()
    n = min(sampler.windows, most or sampler.windows)
    chosen = [i * sampler.windows // n for i in range(n)]
    own = chosen[layout.data_rank :: layout.data_world]
    share = -(-n // layout.data_world)  # of the rank that has most
    nats = torch.zeros((), dtype=torch.float64, device=layout.device)
    seen = torch.zeros(2, dtype=torch.int64, device=layout.device)  # tokens, bytes
    for at in range(0, share, ROWS):
        numbers = own[at : at + ROWS]
        batch = sampler.take(numbers or chosen[:1])
        if not numbers:  # others still have rows, and their forward passes need this rank
            batch.targets.fill_(IGNORE)
        counted = batch.targets[batch.targets != IGNORE]
        ours = torch.tensor([counted.numel(), int(token_bytes[counted].sum())])
        ours = layout.all_reduce(ours.to(layout.device))
        batch = batch.to(layout.device)
        count = ours[0].clamp(min=1)
        with autocast(layout.device, dtype):
            loss = layout.loss(model, batch, count)
        nats += layout.all_reduce(loss, "mean").double() * count
        seen += ours
    model.train(training)
    tokens, length = seen.tolist()
    loss_each = float(nats) / max(1, tokens)
    return Evaluation(
        loss_each, math.exp(min(loss_each, 700.0)), float(nats) / math.log(2.0) / max(1, length)
    )


def write(
    model: GPT, tokenizer: Tokenizer, config: EvalConfig, device: torch.device, seed: int
) -> list[str]:
    """Texts that the model makes of config.prompt.

    Raises:
        ValueError: the prompt leaves no room in the context, or there is none and no end of text
            that could begin a document.
    """
    ids = tokenizer.encode(config.prompt)
    if not ids:
        if tokenizer.eos is None:
            raise ValueError("eval: this tokenizer has no end of text; give a prompt")
        ids = [tokenizer.eos]
    room = model.config.block_size - len(ids)
    if room < 1:
        raise ValueError(
            f"eval: the prompt must leave room in the context of {model.config.block_size} tokens;"
            f" got {len(ids)}"
        )
    made = generate(
        model, torch.tensor([ids] * config.samples, device=device), min(room, config.sample_tokens),
        temperature=0.8, top_p=0.95, seed=seed, eos=tokenizer.eos,
    )  # fmt: skip
    return [config.prompt + tokenizer.decode(row) for row in made[:, len(ids) :].tolist()]
