"""An n-gram model to compare with: interpolated modified Kneser-Ney.

Chen, Goodman, An empirical study of smoothing techniques for language modeling, 1998,
https://dash.harvard.edu/handle/1/25104739, section 3: equations 27 to 29. With c the counts of the
longest n-grams, and of shorter ones the number of different tokens that they come after,

    p(w | h) = (c(h w) - D(c(h w))) / sum_v c(h v) + (the discounts of h together) p(w | h')

where h' is h without its first token, and below the single tokens stands 1 / V.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length: an n-gram is a number whose digits to the base V are its ids."""

    keys: Ints  # sorted
    gains: Floats  # (c - D(c)) / total of the context
    contexts: Ints  # sorted
    rests: Floats  # what the discounts of the context leave for the shorter n-grams


class KneserNey:
    """An n-gram model of token ids.

    Args:
        ids: (N,) the training text, its documents end to end.
        vocab_size: V, with V^order below 2^63.
        order: n, the longest n-grams.

    Raises:
        ValueError: V^order does not fit, or the text is shorter than order.
    """

    def __init__(self, ids: npt.NDArray[np.integer], vocab_size: int, order: int) -> None:
        if vocab_size**order >= 2**63 or len(ids) < order:
            raise ValueError(
                "ngram: vocab_size^order must be below 2^63 and the text no shorter than order;"
                f" got {vocab_size}^{order} and {len(ids)} tokens"
            )
        self.vocab_size, self.order = vocab_size, order
        keys, counts = np.unique(self._windows(ids, order), return_counts=True)
        self._orders = [_discounted(keys, counts, vocab_size)]
        for n in range(order - 1, 0, -1):
            keys, counts = np.unique(keys % vocab_size**n, return_counts=True)
            self._orders.insert(0, _discounted(keys, counts, vocab_size))

    def _windows(self, ids: npt.NDArray[np.integer], n: int) -> Ints:
        """(N - n + 1,) the n-grams of a text, as numbers."""
        N = len(ids) - n + 1
        keys = np.zeros(N, np.int64)
        for i in range(n):
            keys = keys * self.vocab_size + ids[i : i + N]
        return keys

    def bits(self, ids: npt.NDArray[np.integer]) -> Floats:
        """(N - order + 1,) bits of each token of a text that has order - 1 tokens before it."""
        return -np.log2(self._p(self._windows(ids, self.order)))

    def next(self, ids: list[int]) -> Floats:
        """(V,) probabilities of the token after ids, at least order - 1 of them."""
        context = self._windows(np.asarray(ids[len(ids) - self.order + 1 :]), self.order - 1)
        return self._p(context * self.vocab_size + np.arange(self.vocab_size))

    def _p(self, keys: Ints) -> Floats:
        """(M,) p(w | h) of n-grams h w, from the single tokens up."""
        V = self.vocab_size
        p = np.full(len(keys), 1.0 / V)
        for n, order in enumerate(self._orders, 1):
            short = keys % V**n
            p = _find(order.keys, order.gains, short, 0.0) + p * _find(
                order.contexts, order.rests, short // V, 1.0
            )
        return p


def _discounted(keys: Ints, counts: Ints, V: int) -> _Order:
    n1, n2, n3, n4 = (max(1, int((counts == c).sum())) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    # Of a text too small for these estimates the discounts stay within [0, count].
    taken = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    discount = np.clip(taken, 0.0, [0, 1, 2, 3])[np.minimum(counts, 3)]
    contexts, of = np.unique(keys // V, return_inverse=True)
    total = np.bincount(of, counts)
    return _Order(
        keys,
        (counts - discount) / total[of],
        contexts,
        np.bincount(of, discount) / total,
    )


def _find(keys: Ints, values: Floats, wanted: Ints, absent: float) -> Floats:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], absent)
