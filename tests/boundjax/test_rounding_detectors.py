"""Networks that tell float32 from real arithmetic, or one order of summation from another.

Such a network says one thing to a verifier and another one when it runs ("No Soundness in the Real
World", arXiv 2506.01054). Bounds for `"float32"` hold for everything that a program may compute, so
neither answer may be certified.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax import verify, vnnlib

BIG = np.float32(2.0**24)  # above it float32 has even integers only
COUNT = 32
TERMS = np.concatenate([[BIG], np.ones(COUNT), [-BIG]]).astype(np.float32)


class Detector(NamedTuple):
    """A network `[n] -> [1]` whose programs differ at an input.

    Attributes:
      function: `(numpy or jax.numpy, x) -> y`. In float64 it is exact enough.
      x: the input.
      threshold: lies between the values of two programs, or of a program and the exact one.
      eps: radius of a ball on which they differ.
      programs: further values that programs may compute at `x`.
      fools: whether bounds that are not rounded certainly take one of the values for impossible.
        Bounds of functions have some room in any case, and factors that underflow may give NaN.
    """

    function: Callable[[Any, Any], Any]
    x: np.ndarray
    threshold: float
    eps: float = 2.0**-10
    programs: tuple[float, ...] = ()
    fools: bool = True

    def values(self):
        """The exact value and those of float32 programs, at the input."""
        with np.errstate(under="ignore"):
            ends = [self.function(np, self.x.astype(t)) for t in (np.float64, np.float32)]
        return [float(end[0]) for end in ends] + list(self.programs)

    def traced(self, x):
        return self.function(jnp, x)


def in_sequence(terms):
    total = np.float32(0)
    for term in terms:
        total = np.float32(total + term)
    return float(total)


def between_ones(xp, x):
    ends = xp.ones(1, x.dtype)
    return xp.concatenate([ends, x, ends])


def convolved(xp, x):
    image = between_ones(xp, x)
    if xp is np:
        return np.sum(image * TERMS, keepdims=True)
    kernel = jnp.asarray(TERMS)[None, None]
    return jax.lax.conv_general_dilated(image[None, None], kernel, (1,), "VALID")[0, 0]


def layers(xp, x):
    one = np.ones((1, 1), np.float32)
    return xp.maximum(x @ one + BIG, 0) @ one - BIG


def residual(xp, x):
    branch = xp.maximum(x + 1, 0) * BIG
    return (branch + x) - branch


def contracted(xp, x):
    """What rounding takes from `w x`; exactly 0, but not if the product is fused with the sum."""
    w = np.float32(1.0 + 2.0**-12)
    pair = xp.concatenate([x, x * w])
    return (pair @ np.array([[w], [-1]], np.float32)) * np.float32(2.0**26)


def scaled(x, *exponents):
    for exponent in exponents:
        x = x * np.float32(2.0**exponent)
    return x


HALF, HALVES = np.full(1, 0.5, np.float32), np.full(COUNT, 0.5, np.float32)
LATE = (in_sequence([BIG, *HALVES, -BIG]), in_sequence([BIG, -BIG, *HALVES]))
DETECTORS = {
    "shift": Detector(lambda xp, x: (x + BIG) - BIG, HALF, 0.25),
    "layers": Detector(layers, HALF, 0.25),
    "residual": Detector(residual, HALF, 0.25),
    "product": Detector(
        lambda xp, x: between_ones(xp, x) @ TERMS[:, None], HALVES, 12.0, programs=LATE
    ),
    "convolution": Detector(convolved, HALVES, 12.0, programs=LATE),
    "sum": Detector(
        lambda xp, x: xp.sum(between_ones(xp, x) * TERMS, keepdims=True), HALVES, 12.0,
        programs=LATE,
    ),
    "precision": Detector(
        lambda xp, x: scaled((x + 1) - 1, 27), np.full(1, 2.0**-26, np.float32), 1.0, 2.0**-30
    ),
    "fused multiply-add": Detector(
        contracted, np.full(1, 1.0 + 2.0**-12, np.float32), 2.0, 0.0, programs=(4.0,)
    ),
    "underflow": Detector(
        lambda xp, x: scaled(x, -100, -40, 60, 80), HALF, 0.25, programs=(0.0,), fools=False
    ),
    "saturation": Detector(
        lambda xp, x: scaled(1 - xp.tanh(x + np.float32(12)), 36), HALF, 1.0, fools=False
    ),
    "exponential": Detector(
        lambda xp, x: scaled(xp.exp(x - np.float32(96.5)), 60, 80), HALF, 1.0, programs=(0.0,),
        fools=False,
    ),
}  # fmt: skip
TRANSFORMS = {
    "interval": bj.interval,
    "crown-ibp": bj.linear,
    "crown": functools.partial(bj.linear, intermediate="linear"),
    "forward": bj.forward_linear,
}


def bounds_of(detector, transform, rounding):
    """Of the output on the ball, as Python's numbers."""
    ball = bj.LpBall(jnp.asarray(detector.x), detector.eps)
    bounds = jax.jit(TRANSFORMS[transform](detector.traced, rounding=rounding))(ball)
    return float(bounds.lower[0]), float(bounds.upper[0])


def exclude(bounds, value):
    """Whether bounds say that a value cannot occur; NaN says nothing."""
    lower, upper = bounds
    return lower > value or upper < value


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.sampled(3)
def test_bounds_hold_for_what_is_promised(name):
    detector = DETECTORS[name]
    values = detector.values()
    assert min(values) < detector.threshold < max(values)
    fooled = False
    for transform in ("interval", "crown-ibp"):
        bounds = bounds_of(detector, transform, "float32")
        assert not any(exclude(bounds, value) for value in values)
        assert not exclude(bounds_of(detector, transform, "real"), values[0])
        nearest = bounds_of(detector, transform, "nearest")
        fooled |= exclude(nearest, min(values)) or exclude(nearest, max(values))
    assert fooled or not detector.fools


@pytest.mark.parametrize("name", ["layers", "residual"])
@pytest.mark.parametrize("transform", ["crown", "forward"])
def test_bounds_of_other_transforms_hold_too(name, transform):
    detector = DETECTORS[name]
    bounds = bounds_of(detector, transform, "float32")
    assert not any(exclude(bounds, value) for value in detector.values())


def certified(detector, method, rounding):
    """For which of "above" and "below the threshold" there is a certificate."""

    def logits(x):
        output = jax.vmap(detector.traced)(x)
        return jnp.concatenate([output, jnp.full_like(output, detector.threshold)], axis=1)

    twice, labels = np.stack([detector.x, detector.x]), np.array([0, 1])
    certificate = bj.certify(
        logits, twice, detector.eps, labels=labels, method=method, rounding=rounding
    )
    assert certificate.arithmetic == rounding
    return certificate.verified


@pytest.mark.parametrize("name", ["shift", "layers", "precision"])
def test_a_detector_is_not_certified(name):
    detector = DETECTORS[name]
    for method in ("interval", "crown-ibp"):
        assert not certified(detector, method, "float32").any()
    assert any(certified(detector, method, "nearest").any() for method in ("interval", "crown-ibp"))


@pytest.mark.parametrize("name", ["shift", "product"])
@pytest.mark.parametrize("unsafe", ["<=", ">="])
def test_verify_proves_nothing_about_a_detector(name, unsafe):
    detector = DETECTORS[name]
    declared = "".join(
        f"(declare-const X_{i} Real)(assert (>= X_{i} {x - detector.eps:.40f}))"
        f"(assert (<= X_{i} {x + detector.eps:.40f}))"
        for i, x in enumerate(detector.x.astype(np.float64))
    )
    property = vnnlib.parse(
        f"{declared}(declare-const Y_0 Real)(assert ({unsafe} Y_0 {detector.threshold}))"
    )
    result = verify.verify(detector.traced, property, method="crown", timeout=2.0)
    assert result.verdict != "unsat"


def test_a_network_that_detects_nothing_is_certified():
    """The same layers with a small shift: refusing everything would pass the tests above."""
    plain = Detector(lambda xp, x: (x + np.float32(2.0)) - np.float32(2.0), HALF, 0.25)
    assert max(plain.values()) == min(plain.values()) == 0.5
    for method in ("interval", "crown-ibp"):
        np.testing.assert_array_equal(certified(plain, method, "float32"), [True, False])
