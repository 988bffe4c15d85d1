"""Slopes and biases, by hand-written numbers and by the plain formula."""

import pytest
import torch

from modeling_jina_bert import alibi_bias, alibi_hankel, alibi_slopes


def test_slopes_written_by_hand():
    assert alibi_slopes(8) == tuple(2.0**-k for k in range(1, 9))
    assert alibi_slopes(16) == tuple(2.0 ** (-k / 2) for k in range(1, 17))
    exponents = (1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5)
    assert alibi_slopes(12) == tuple(2.0**-e for e in exponents)
    assert alibi_slopes(6) == tuple(2.0**-e for e in (2, 4, 6, 8, 1, 3))
    assert alibi_slopes(1) == (2.0**-8,)


@pytest.mark.parametrize("heads", range(1, 33))
def test_any_number_of_heads(heads):
    slopes = alibi_slopes(heads)
    assert len(set(slopes)) == heads
    assert all(0 < slope < 1 for slope in slopes)


def test_no_heads_is_an_error():
    with pytest.raises(ValueError, match="num_heads=0"):
        alibi_slopes(0)


@pytest.mark.parametrize("length", [1, 2, 7, 129])
def test_biases_are_the_formula(length):
    slopes = torch.tensor(alibi_slopes(6), dtype=torch.float64)
    expected = torch.empty(6, length, length, dtype=torch.float64)
    for head in range(6):
        for i in range(length):
            for j in range(length):
                expected[head, i, j] = -slopes[head] * abs(i - j)
    assert torch.equal(alibi_bias(slopes, length)[0], expected)
    assert torch.equal(alibi_hankel(slopes, length)[0].flip(1), expected)


def test_the_hankel_view_is_linear_in_the_length():
    length = 131_072
    view = alibi_hankel(torch.tensor(alibi_slopes(12)), length)
    assert view.shape == (1, 12, length, length)
    assert view.untyped_storage().nbytes() == 12 * (2 * length - 1) * 4
