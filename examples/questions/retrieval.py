"""The baseline: the answer to the nearest training question, by TF-IDF and cosine.

Manning, Raghavan, Schütze, Introduction to information retrieval, 2008, sections 6.2 and 6.3,
https://nlp.stanford.edu/IR-book/.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

from fastgpt.answers import normalised


class Retrieval:
    """Finds texts by words and pairs of words, weighted (1 + log tf) log(N / df).

    Args:
        texts: to search.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counted = [_terms(text) for text in texts]
        df = Counter(term for terms in counted for term in terms)
        self._idf = {term: math.log(len(texts) / count) for term, count in df.items()}
        self._places: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for n, terms in enumerate(counted):
            for term, weight in self._weights(terms).items():
                self._places[term].append((n, weight))

    def nearest(self, text: str) -> int:
        """The number of the text with the largest cosine; 0 if none shares a term."""
        scores = defaultdict[int, float](float, {0: 0.0})
        for term, weight in self._weights(_terms(text)).items():
            for n, other in self._places.get(term, ()):
                scores[n] += weight * other
        return max(scores, key=scores.__getitem__)

    def _weights(self, terms: Counter[str]) -> dict[str, float]:
        raw = {t: (1 + math.log(c)) * self._idf.get(t, 0.0) for t, c in terms.items()}
        norm = math.sqrt(sum(w * w for w in raw.values())) or 1.0
        return {t: w / norm for t, w in raw.items()}


def _terms(text: str) -> Counter[str]:
    words = normalised(text).split()
    return Counter(words) + Counter(map(" ".join, pairwise(words)))
