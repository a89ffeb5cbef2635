"""Whether outputs are unsafe is decided exactly, even for infinite ones."""

from fractions import Fraction

import numpy as np
import pytest

from boundjax.properties import Conjunction

pytestmark = pytest.mark.quick


def test_random_rows_as_fractions_decide():
    rng = np.random.default_rng(0)
    decided = set()
    for _ in range(300):
        outputs = rng.normal(size=4).astype(np.float32)
        weights = rng.integers(-3, 4, size=(2, 4)) * 2.0 ** rng.integers(-20, 20, size=(2, 1))
        # Thresholds next to the value itself, where rounding matters.
        offset = -(weights @ outputs.astype(np.float64))
        offset = np.nextafter(offset, rng.choice([-np.inf, np.inf], size=2))
        expected = all(
            sum(Fraction(w) * Fraction(float(y)) for w, y in zip(row, outputs, strict=True))
            + Fraction(constant)
            <= 0
            for row, constant in zip(weights.tolist(), offset.tolist(), strict=True)
        )
        assert Conjunction(weights, offset).contains(outputs) == expected
        decided.add(expected)
    assert decided == {True, False}


@pytest.mark.parametrize(
    ("outputs", "unsafe"),
    [
        ([np.inf, 0.0], False),
        ([-np.inf, 0.0], True),
        ([0.0, np.inf], True),
        ([-np.inf, np.inf], True),
        ([np.inf, np.inf], False),
        ([np.nan, 0.0], False),
        ([-np.inf, np.nan], False),
    ],
)
def test_an_infinite_output_is_larger_than_any_number_and_nan_is_none(outputs, unsafe):
    rows = Conjunction(np.array([[1.0, -2.0]]), np.array([-1e300 if unsafe else 1e300]))
    assert rows.contains(np.float32(outputs)) == unsafe


def test_an_infinite_output_without_a_weight_does_not_matter():
    rows = Conjunction(np.array([[1.0, 0.0]]), np.array([-1.0]))
    assert rows.contains(np.float32([1.0, np.inf]))
    assert not rows.contains(np.float32([2.0, -np.inf]))
