"""The generator behind dropout: known answers, statistics, one mask for kernel and reference."""

import pytest
import torch

from fastgpt.ops import dropout_mask
from fastgpt.ops.dropout import philox, threshold


def words(seed: int, *counter: int) -> int:
    c = [torch.tensor(x, dtype=torch.int64) for x in counter]
    return int(philox(torch.tensor(seed), *c))


def test_known_answers_of_random123() -> None:
    """philox4x32 with 7 rounds, file kat_vectors of the authors' library Random123."""
    assert words(0, 0, 0, 0) == 0x5F6FB709


def test_a_mask_belongs_to_the_element() -> None:
    seed = torch.tensor([77])
    whole = dropout_mask(seed, (2, 3, 40, 50), 0.3)
    assert torch.equal(whole[..., :30, :20], dropout_mask(seed, (2, 3, 30, 20), 0.3))
    assert torch.equal(whole[:1], dropout_mask(seed, (1, 3, 40, 50), 0.3))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_an_element_is_dropped_with_probability_p(p: float) -> None:
    keep = dropout_mask(torch.tensor([5]), (4, 250, 1000), p).double()
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(keep.mean() - (1 - p)) <= 4 * deviation
    for dim in (0, 1, 2):  # neighbours along each dimension are independent
        a, b = keep.narrow(dim, 0, keep.shape[dim] - 1), keep.narrow(dim, 1, keep.shape[dim] - 1)
        assert abs((a * b).mean() - (1 - p) ** 2) <= 4 * deviation


def test_two_seeds_give_two_masks() -> None:
    a, b = (dropout_mask(torch.tensor([s]), (100, 100), 0.5) for s in (1, 2**32 + 1))
    assert 0.4 < (a == b).double().mean() < 0.6


def test_threshold_is_exact_at_the_ends() -> None:
    assert threshold(0.0) == 0 and threshold(0.5) == 2**30


@pytest.mark.gpu
def test_kernel_draws_the_same_bits(device: str) -> None:
    """Through layer norm of ones: what is left of them is the mask."""
    import fastgpt

    seed = torch.tensor([2**61 + 12345], device=device)
    x = torch.ones(33, 70, device=device)
    with fastgpt.use("triton"):
        _, h = fastgpt.ops.layer_norm(
            x, x[0], residual=torch.zeros_like(x), dropout_p=0.5, seed=seed
        )
    assert torch.equal(h > 0, dropout_mask(seed, (33, 70), 0.5))
