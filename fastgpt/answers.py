"""Answers of a model, and how right they are: exact match and F1, as SQuAD counts them.

Rajpurkar et al., SQuAD: 100,000+ questions for machine comprehension of text, 2016,
https://arxiv.org/abs/1606.05250, section 6.1.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """A text in lower case without punctuation, English articles and needless spaces."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", text).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if an answer is one of those accepted, all of them normalised; else 0."""
    return float(normalised(answer) in map(normalised, accepted))


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of an answer's words, with that which fits best.

    Where both have no words once they are normalised it is 1.
    """
    return max(_f1(normalised(answer).split(), normalised(one).split()) for one in accepted)


def _f1(got: list[str], want: list[str]) -> float:
    if not got or not want:
        return float(got == want)
    same = sum((Counter(got) & Counter(want)).values())
    return 2.0 * same / (len(got) + len(want))


def answers(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int = 32,
    rows: int = 32,
) -> list[str]:  # fmt: skip
    """The likeliest continuation of each prompt, up to the end of text or of the line.

    Args:
        model: in training or evaluation mode.
        tokenizer: its own.
        prompts: each with room for max_new_tokens in the model's context.
        max_new_tokens: of each; at least 1.
        rows: the most that are continued at once; they are of one length.

    Returns:
        A text for each prompt, in their order, without spaces around.

    Raises:
        ValueError: a prompt has no tokens, or leaves no room.
    """
    from fastgpt import generate

    device = model.wte.weight.device
    ids = tokenizer.encode_all(prompts)
    by_length: dict[int, list[int]] = defaultdict(list)
    for n, one in enumerate(ids):
        by_length[len(one)].append(n)
    made = [""] * len(prompts)
    for length, numbers in by_length.items():
        for at in range(0, len(numbers), rows):
            chosen = numbers[at : at + rows]
            tokens = torch.tensor([ids[n] for n in chosen], device=device)
            out = generate(model, tokens, max_new_tokens, temperature=0.0, eos=tokenizer.eos)
            for n, row in zip(chosen, out[:, length:].tolist(), strict=True):
                made[n] = tokenizer.decode(row).strip().split("\n")[0].strip()
    return made
