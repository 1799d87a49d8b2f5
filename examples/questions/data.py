"""Trivia questions of the package Red-Trivia, divided so that no held-out one was seen."""

import random
from collections import Counter
from dataclasses import dataclass

import yaml

from examples.packages import texts
from fastgpt.answers import normalised

PACKAGE = "Red-Trivia==1.1.1"
SHA256 = "39413b9fb3f9b9362d6de1dcf69a4bf635b0f3518243f7178299b96d26cbb6a7"
# The lists about the world at large; others are about one game, film or series, or show pictures.
LISTS = (
    "artandliterature", "computers", "elements", "entertainment", "general", "greekmyth", "sports",
    "uscapitals", "usstateabbreviations", "worldcapitals",
)  # fmt: skip
HELD_OUT = 0.2
COMMON = 0.05  # words in so large a share of the questions tell nothing of one
NEAR = 0.5


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        text: of it.
        accepted: the answers that count as right, the usual one first.
        list: which of LISTS it is from.
    """

    text: str
    accepted: tuple[str, ...]
    list: str


def read() -> list[Question]:
    """The questions of LISTS, each once."""
    found: dict[str, Question] = {}
    for name, text in texts(PACKAGE, SHA256, "/trivia/lists/", ".yaml"):
        if name not in LISTS:
            continue
        for asked, accepted in yaml.safe_load(text).items():
            if isinstance(accepted, list):  # else it is about the list
                one = Question(" ".join(asked.split()), tuple(map(str, accepted)), name)
                found.setdefault(normalised(one.text), one)
    return list(found.values())


def divide(questions: list[Question], seed: int) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions; what is near a held-out one is in neither.

    A question stands for the words of it and of its answers, but for those that COMMON of all
    questions have. Two are near each other if of the words of both together a share of NEAR is in
    each: the same asked otherwise, or the other way round.
    """
    order = random.Random(seed).sample(questions, len(questions))
    n = round(len(order) * HELD_OUT)
    counts = Counter(word for one in questions for word in set(normalised(one.text).split()))
    common = {word for word, count in counts.items() if count > COMMON * len(questions)}

    def words(one: Question) -> set[str]:
        return set(normalised(" ".join((one.text, *one.accepted))).split()) - common

    held_out = [words(one) for one in order[:n]]
    train = []
    for one in order[n:]:
        mine = words(one)
        if all(len(mine & other) < NEAR * len(mine | other) for other in held_out):
            train.append(one)
    return train, order[:n]
