"""Spanish and English Bible verses to pairs, and what of them is held out."""

import random
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PACKAGES = ("libsword-utils", "sword-text-sparv", "sword-text-web")
SOURCE, TARGET = "spaRV1909eb", "engWEB2015eb"
VERSE = re.compile(r"(.+ \d+):[1-9]\d*")
APART = re.compile(r"<(note|title)\b.*?</\1>", re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.;:?!])\s+")
WORD = re.compile(r"\w+(?:['-]\w+)*|[^\w\s]")
INITIAL = re.compile(r"^(\w )?([^\W\d_]{2,})\b")  # of a chapter, in capitals: "Y FUERON acabados"


class Pair(NamedTuple):
    """A text and its translation.

    Attributes:
        chapter: they are of, as "Genesis 1".
        source, target: Spanish, English.
    """

    chapter: str
    source: str
    target: str


def read_verses(module: str) -> dict[str, str]:
    """The verses of a module of SWORD by their names.

    Raises:
        ValueError: a package is missing.
    """
    made = None
    if shutil.which("mod2imp"):
        made = subprocess.run(["mod2imp", module, "-r"], capture_output=True, check=False)
    if made is None or made.returncode or not (found := verses(made.stdout.decode())):
        raise ValueError(
            f"translation: needs {module} of SWORD; apt-get install {' '.join(PACKAGES)}"
        )
    return found


def verses(imp: str) -> dict[str, str]:
    """The verses in what mod2imp writes: {"Genesis 1:1": "In the beginning, ..."}."""
    found = {}
    for part in imp.split("$$$")[1:]:
        name, _, text = part.partition("\n")
        text = re.sub("<[^>]*>", "", APART.sub(" ", text).replace("</w><w", "</w> <w"))
        if VERSE.fullmatch(name) and text.strip():
            text = clean(text)
            first = INITIAL.match(text) if name.endswith(":1") else None
            if first and first[2].isupper():
                text = (first[1] or "") + first[2].capitalize() + text[first.end() :]
            found[name] = text
    return found


def clean(text: str) -> str:
    """One space between words, straight apostrophes, and no quotation marks: Spanish has none."""
    return " ".join(re.sub("[“”‘]", "", text).replace("’", "'").split())


def read_pairs() -> list[Pair]:
    """All verses that are in both languages."""
    source, target = read_verses(SOURCE), read_verses(TARGET)
    return [
        Pair(name.split(":")[0], text, target[name])
        for name, text in source.items()
        if name in target
    ]


def words(text: str) -> list[str]:
    """Words and punctuation marks."""
    return WORD.findall(text)


def short(pairs: Iterable[Pair], most: int) -> list[Pair]:
    """Those of at most so many words on each side."""
    return [p for p in pairs if max(len(p.source.split()), len(p.target.split())) <= most]


def parts(pair: Pair) -> list[Pair]:
    """A verse cut at . ; : ? ! if both sides have as many parts, and each is about as long as its
    translation; else the verse."""
    sides = SENTENCE_END.split(pair.source), SENTENCE_END.split(pair.target)
    if len(sides[0]) != len(sides[1]):
        return [pair]
    cut = [Pair(pair.chapter, *both) for both in zip(*sides, strict=True)]
    alike = all(0.5 <= (len(p.source) + 8) / (len(p.target) + 8) <= 2.0 for p in cut)
    return cut if alike else [pair]


def divide(pairs: Sequence[Pair], chapters: Sequence[int], seed: int = 0) -> tuple[list[Pair], ...]:
    """The pairs of so many chapters, drawn at random, for each number; and the rest, first."""
    names = sorted({pair.chapter for pair in pairs})
    random.Random(seed).shuffle(names)
    part_of = dict.fromkeys(names, 0)
    at = 0
    for part, count in enumerate(chapters, 1):
        part_of.update(dict.fromkeys(names[at : at + count], part))
        at += count
    made: tuple[list[Pair], ...] = tuple([] for _ in range(len(chapters) + 1))
    for pair in pairs:
        made[part_of[pair.chapter]].append(pair)
    return made


def unlike(held_out: Sequence[Pair], training: Sequence[Pair]) -> list[Pair]:
    """Those held out that no pair of the training part resembles.

    One resembles another if it has at least half of the other's runs of three words, in Spanish or
    in English; of a text of fewer words the run is the text.
    """
    known = set(range(len(held_out)))
    for side in (lambda p: p.source, lambda p: p.target):
        where = defaultdict(list)
        for n, pair in enumerate(training):
            for run in runs(side(pair)):
                where[run].append(n)
        for n, pair in enumerate(held_out):
            shared: dict[int, int] = defaultdict(int)
            own = runs(side(pair))
            for run in own:
                for other in where.get(run, ()):
                    shared[other] += 1
            if 2 * max(shared.values(), default=0) >= len(own):
                known.discard(n)
    return [held_out[n] for n in sorted(known)]


def runs(text: str) -> set[tuple[str, ...]]:
    """The runs of three words in a text, without regard to case or punctuation."""
    tokens = [w for w in words(text.lower()) if w[0].isalnum()]
    return {tuple(tokens[n : n + 3]) for n in range(max(1, len(tokens) - 2))}
