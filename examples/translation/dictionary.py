"""The baseline: a dictionary learned from the pairs, and each word replaced by its translation."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from examples.translation.pairs import Pair, words

Floats = npt.NDArray[np.float64]


class Dictionary:
    """A translation for each word, put in place of it; a word that is not in it is copied.

    Args:
        of: the translation of each word in small letters.
    """

    def __init__(self, of: dict[str, str]) -> None:
        self.of = of

    @classmethod
    def learn(cls, pairs: Sequence[Pair], rounds: int = 5) -> "Dictionary":
        """For each source word f the target word e with the largest p(e | f) p(f | e).

        Args:
            pairs: to learn p from by `ibm_model_1`, in both directions.
            rounds: of it.
        """
        texts = [p.source for p in pairs], [p.target for p in pairs]
        (f, names), (e, others) = (_numbered(side) for side in texts)
        keys, p = ibm_model_1(f, e, len(others), rounds)
        turned, q = ibm_model_1(e, f, len(names), rounds)
        source, target = np.divmod(keys, len(others))
        p *= q[np.searchsorted(turned, target * len(names) + source)]
        best = {source[n]: target[n] for n in np.argsort(p, kind="stable").tolist()}
        forms: dict[str, str] = {}  # as the word is mostly written where no sentence begins
        for word, _ in Counter(w for p in pairs for w in words(p.target)[1:]).most_common():
            forms.setdefault(word.lower(), word)
        return cls({names[a]: forms.get(others[b], others[b]) for a, b in best.items()})

    @classmethod
    def load(cls, path: Path) -> "Dictionary":
        """Read what `save` wrote."""
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(self.of, ensure_ascii=False, indent=0), encoding="utf-8")

    def translate(self, text: str) -> str:
        """Word by word; marks are kept but for those that only Spanish has."""
        made = ""
        for word in words(text):
            if not word[0].isalnum():
                made += "" if word in "¿¡" else word
                continue
            made += " " * bool(made) + self.of.get(word.lower(), word)
        return made[:1].upper() + made[1:] if text.lstrip("¿¡")[:1].isupper() else made


def ibm_model_1(
    f: Sequence[Sequence[int]], e: Sequence[Sequence[int]], size: int, rounds: int
) -> tuple[npt.NDArray[np.int64], Floats]:
    """p(e | f), so that each word of e comes from one of f: expectation maximisation.

    Brown et al., The mathematics of statistical machine translation, 1993,
    https://aclanthology.org/J93-2003, section 4.1; without the empty word.

    Args:
        f, e: the sentences of both sides, as numbers.
        size: numbers of e lie below it.
        rounds: of expectation maximisation.

    Returns:
        (n,) keys f * size + e of the words that stand in one pair, and (n,) their p.
    """
    links, ends, at = [], [], 0
    for fs, es in zip(f, e, strict=True):
        links.append(
            (np.array(fs, np.int64)[None] * size + np.array(es, np.int64)[:, None]).ravel()
        )
        ends.append(np.repeat(np.arange(at, at + len(es)), len(fs)))
        at += len(es)
    keys, link = np.unique(np.concatenate(links), return_inverse=True)
    word, source = np.concatenate(ends), keys // size
    p = np.ones(len(keys))
    for _ in range(rounds):
        share = p[link]
        share /= np.bincount(word, share)[word]
        count = np.bincount(link, share)
        p = count / np.bincount(source, count)[source]
    return keys, p


def _numbered(texts: list[str]) -> tuple[list[list[int]], list[str]]:
    """The words of each text as numbers, and the words."""
    number: dict[str, int] = {}
    ids = [
        [number.setdefault(w, len(number)) for w in words(text.lower()) if w[0].isalnum()]
        for text in texts
    ]
    return ids, list(number)
