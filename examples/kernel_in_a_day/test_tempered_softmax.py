"""The kernel against PyTorch, by the law of tests/check.py, and what PyTorch cannot show."""

import pytest
import torch

from examples.kernel_in_a_day.tempered_softmax import tempered_softmax, tempered_softmax_ref
from tests.check import assert_matches
from tests.conftest import DTYPES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 64), (2, 2, 65)], ids=str)
def test_matches_pytorch(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """One column, a prime, a whole chunk, one more than that; three chunks in the last."""
    torch.manual_seed(0)
    x = 4 * torch.randn(shape, device=device).to(dtype)
    for t in (0.7, 3.0):
        assert_matches(
            lambda x, t=t: tempered_softmax(x, t, block_n=32),
            lambda x, t=t: tempered_softmax_ref(x, t),
            {"x": x},
        )


def test_large_logits_stay_finite_and_hidden_ones_weigh_nothing(device: str) -> None:
    x = torch.tensor([[1e4, 1e4, -1e4, float("-inf")] * 16], device=device)
    y = tempered_softmax(x, 0.5, block_n=16)
    assert torch.equal(y, torch.tensor([[1 / 32, 1 / 32, 0, 0] * 16], device=device))


def test_rows_apart_are_copied_and_no_rows_are_no_launch(device: str) -> None:
    x = torch.randn(7, 5, device=device).T
    want = tempered_softmax_ref(x, 2.0)
    torch.testing.assert_close(tempered_softmax(x, 2.0, block_n=16), want)
    assert tempered_softmax(x[:0], 2.0).shape == (0, 7)


def test_the_temperature_is_positive(device: str) -> None:
    x = torch.tensor([0.0, 1.0], device=device)
    assert tempered_softmax(x, 1e-3, block_n=16).tolist() == [0.0, 1.0]
    for t in (0.0, -1.0):
        with pytest.raises(ValueError, match="must be positive; got"):
            tempered_softmax(x, t)
