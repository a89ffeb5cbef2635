"""Whether outputs are unsafe: decided exactly, on the numbers of the file."""

from fractions import Fraction

import numpy as np
import pytest

from boundjax import vnnlib
from boundjax.properties import Conjunction


def conjunction(tmp_path, text, outputs=1):
    declared = "".join(f"(declare-const Y_{i} Real)" for i in range(outputs))
    path = tmp_path / "p.vnnlib"
    path.write_text(
        f"(declare-const X_0 Real){declared}(assert (and (<= 0 X_0) (<= X_0 1)))(assert {text})"
    )
    (case,) = vnnlib.load(path).cases
    (only,) = case.conjunctions
    return only


# Text, outputs, unsafe.
EXACT = {
    "a threshold that float64 rounds to 1": ("(<= Y_0 0." + "9" * 20 + ")", [1.0], False),
    "one that is reached": ("(<= Y_0 0." + "9" * 20 + ")", [np.nextafter(1, 0, dtype="f4")], True),
    "a decimal that no float32 is": ("(>= Y_0 0.1)", [np.float32(0.1)], True),
    "the other side of it": ("(<= Y_0 0.1)", [np.float32(0.1)], False),
    "a tie": ("(<= Y_0 0.5)", [0.5], True),
    "terms that cancel": ("(<= (- (* 1e30 Y_0) (* 1e30 Y_1)) 1e-30)", [1.0, 1.0], True),
    "terms that nearly cancel": ("(<= (+ Y_0 (* -1 Y_1)) -1e-20)", [1.0, 1.0], False),
}


@pytest.mark.parametrize("kind", EXACT)
def test_rows_are_compared_with_outputs_exactly(kind, tmp_path):
    text, outputs, unsafe = EXACT[kind]
    rows = conjunction(tmp_path, text, len(outputs))
    assert rows.contains(np.float32(outputs)) == unsafe


def test_random_rows_as_fractions_decide():
    rng = np.random.default_rng(0)
    decided = set()
    for _ in range(300):
        outputs = rng.normal(size=4).astype(np.float32)
        weights = rng.integers(-3, 4, size=(2, 4)) * 2.0 ** rng.integers(-20, 20, size=(2, 1))
        # Next to the value itself, where rounding decides.
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


def test_another_number_of_outputs_is_refused():
    with pytest.raises(ValueError, match="expected 2 outputs, got 3"):
        Conjunction(np.ones((1, 2)), np.zeros(1)).contains(np.zeros(3))
