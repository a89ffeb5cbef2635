"""Rounding proves nothing: bounds of `verify` against exact arithmetic and float32 programs."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rationals import exact

import boundjax as bj
from boundjax import verify, vnnlib
from boundjax.search.rows import Rows, lost_of


def test_a_proof_needs_a_device_whose_products_are_plain_sums(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(bj.NoProofError, match="rounding on 'gpu' devices; compute on the CPU"):
        verify.Programs(lambda x: x, (2,))
    assert verify.Programs(lambda x: x, (2,), rounding="nearest").output_size == 2


# --- verdicts ----------------------------------------------------------------------------------


def property_of(lower, upper, outputs, unsafe):
    text = "".join(f"(declare-const Y_{i} Real)" for i in range(outputs))
    for i, ends in enumerate(zip(lower, upper, strict=True)):
        low, high = (f"{float(end):.40f}" for end in ends)
        text += f"(declare-const X_{i} Real)(assert (>= X_{i} {low}))(assert (<= X_{i} {high}))"
    return vnnlib.parse(f"{text}(assert {unsafe})")


SMALL = Fraction(1, 2**12)
# In fractions and in JAX. The hidden values of the second are about 1 for every input.
CANCELLING = {
    "first layer": (lambda w, x: x @ w, lambda w, x: x @ w),
    "second layer": (
        lambda w, x: (SMALL * x + 1) @ w,
        lambda w, x: (jax.nn.relu(jnp.float32(SMALL) * x) + 1.0) @ w,
    ),
}


def wrong_by_rounding(name, inputs, boxes):
    """Weights of a network on inputs in `[1, 1 + 2 spacings]`, and a threshold for its output.

    The threshold lies above the exact value at a point and below the bound without outward
    rounding. Of several seeds the one with the widest gap is used. The number of boxes matters,
    because it changes the order in which products are added.
    """
    in_fractions, in_jax = CANCELLING[name]
    lower = np.ones(inputs, np.float32)
    upper = lower + np.float32(2.0**-22)

    @jax.jit
    def plain(weights):
        def bounds(lower, upper, rows):
            transformed = bj.linear(lambda x: in_jax(weights, x)[None], sides="lower")
            return transformed(bj.Box(lower, upper), rows).lower[0]

        repeated = [jnp.stack([end] * boxes) for end in (lower, upper)]
        return jax.vmap(bounds)(*repeated, jnp.ones((boxes, 1, 1)))[0]

    best = None
    for seed in range(100):
        weights = (np.random.default_rng(seed).normal(size=inputs) * 1e5).astype(np.float32)
        weights[-1] = -np.sum(weights[:-1], dtype=np.float64)
        value = in_fractions(exact(weights), exact(np.where(weights > 0, lower, upper)))
        gap = float(Fraction(float(plain(weights))) - value)
        if best is None or gap > best[0]:
            best = gap, weights, value + Fraction(gap) / 2
    assert best[0] > 1e-2
    return lower, upper, *best[1:]


@pytest.mark.parametrize("method", ["crown-ibp", "crown"])
@pytest.mark.parametrize(
    ("name", "inputs", "boxes"), [("first layer", 64, 1), ("second layer", 12, 16)]
)
@pytest.mark.sampled(4)
def test_terms_that_cancel_in_one_product_are_no_proof(name, inputs, boxes, method):
    """One call bounds the whole box, or 16 boxes at once where inputs are few enough to split."""
    lower, upper, weights, threshold = wrong_by_rounding(name, inputs, boxes)
    result = verify.verify(
        lambda x: CANCELLING[name][1](weights, x)[None],
        property_of(lower, upper, 1, f"(<= Y_0 {float(threshold)!r})"),
        method=method,
        timeout=3.0,
    )
    assert result.verdict != "unsat"


def test_what_cancels_far_above_its_rounding_is_proved():
    random = np.random.default_rng(0)
    weights = (random.normal(size=64) * 1e4).astype(np.float32)
    weights[-1] = -np.sum(weights[:-1], dtype=np.float64)
    lower = np.ones(64, np.float32)
    property = property_of(lower, lower + np.float32(2.0**-22), 1, "(<= Y_0 -20.0)")
    result = verify.verify(lambda x: (x @ weights)[None], property, method="interval", timeout=30.0)
    assert result.verdict == "unsat"


def test_the_rounding_of_rows_is_lost():
    """One tenth is no float32; the rounding of such a coefficient is charged."""
    text = "(declare-const X_0 Real)(assert (>= X_0 0))(assert (<= X_0 1))(declare-const Y_0 Real)"
    text += "(declare-const Y_1 Real)(assert (<= (+ (* 0.1 Y_0) (* -0.5 Y_1)) 0.1))"
    rows = Rows.of(vnnlib.parse(text).cases[0].conjunctions, 1)
    distance = abs(Fraction(1, 10) - Fraction(float(np.float32(0.1))))
    lost = lost_of(rows.errors, rows.offset, np.float32([1e9, 1e9]))
    assert float(distance) * 1e9 < lost[0] < 1.001 * float(distance) * 1e9 + 1e-5
    # If an output is unbounded, only rows without a weight on it can prove anything.
    assert lost_of(np.array([[0.0, 1.0]]), np.zeros(1), np.array([np.inf, 2.0]))[0] == 2.0
    assert lost_of(np.array([[1.0, 0.0]]), np.zeros(1), np.array([np.inf, 2.0]))[0] == np.inf
    # Weights below the normal float32 numbers are charged in full; overflowing ones prove nothing.
    tiny = vnnlib.Conjunction(np.array([[1e-40, 1e300]]), np.zeros(1))
    rows = Rows.of([tiny], 1)
    assert rows.single[0, 0] == 0
    assert rows.errors[0, 0] >= 1e-40
    assert rows.errors[0, 1] == np.inf
