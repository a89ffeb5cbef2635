"""Bad input: one line that says what was expected, what came and what to do."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.attacks import pgd

IMAGES = np.random.default_rng(0).uniform(size=(3, 4)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def model(x):
    return x @ jnp.asarray(KERNEL)


certify = functools.partial(bj.certify, model)
radius = functools.partial(bj.certified_radius, model)
nan_image = np.where(np.arange(12).reshape(3, 4) == 5, np.float32(np.nan), IMAGES)
identity_box = bj.Box(jnp.zeros(3), jnp.ones(3))
ZEROS = jnp.zeros(3)

# What is called, the error's type, and what its message must say.
BAD_INPUT = {
    "eps negative": (lambda: certify(IMAGES, -0.1), ValueError, r"eps must be .*>= 0, got -0\.1"),
    "eps nan": (lambda: certify(IMAGES, np.nan), ValueError, r"eps .*got nan"),
    "eps infinite": (lambda: certify(IMAGES, np.inf), ValueError, r"eps .*got inf"),
    "eps negative somewhere": (
        lambda: certify(IMAGES, np.array([0.1, 0.2, -0.3])),
        ValueError,
        r"eps .*got -0\.3.* at index 2",
    ),
    "eps of a wrong shape": (
        lambda: certify(IMAGES, np.ones(7)),
        ValueError,
        r"eps must be a scalar.*got shape \(7,\)",
    ),
    "input nan": (
        lambda: certify(nan_image, 0.1),
        ValueError,
        r"x must be finite, got nan.*\(1, 1\)",
    ),
    "input infinite": (lambda: certify(IMAGES * np.inf, 0.1), ValueError, "x must be finite"),
    "input integers": (
        lambda: certify(IMAGES.astype(int), 0.1),
        TypeError,
        "float32 or float64, got int",
    ),
    "batch empty": (lambda: certify(IMAGES[:0], 0.1), ValueError, r"at least one.*\(0, 4\)"),
    "batch missing": (lambda: certify(np.float32(1.0), 0.1), ValueError, r"batch .*got shape \(\)"),
    "labels out of range": (
        lambda: certify(IMAGES, 0.1, labels=np.array([0, 3, 1])),
        ValueError,
        r"labels must be in 0\.\.2.*got 3 at index 1",
    ),
    "labels negative": (
        lambda: certify(IMAGES, 0.1, labels=np.array([0, 1, -1])),
        ValueError,
        "got -1 at index 2",
    ),
    "labels of a wrong shape": (
        lambda: certify(IMAGES, 0.1, labels=np.array([0, 1])),
        ValueError,
        r"labels must be .*\(3,\).*got .*\(2,\)",
    ),
    "labels not integers": (
        lambda: certify(IMAGES, 0.1, labels=np.array([0.0, 1.0, 2.0])),
        ValueError,
        "labels must be integers.*got float",
    ),
    "method unknown": (
        lambda: certify(IMAGES, 0.1, method="crwn"),
        ValueError,
        "method must be one of .*crown-ibp.*got 'crwn'",
    ),
    "norm unknown": (
        lambda: certify(IMAGES, 0.1, norm=0.5),
        ValueError,
        r"norm must be .*got 0\.5",
    ),
    "clip reversed": (lambda: certify(IMAGES, 0.1, clip=(1.0, 0.0)), ValueError, "low <= high"),
    "clip not a pair": (lambda: certify(IMAGES, 0.1, clip=0.5), ValueError, r"pair \(low, high\)"),
    "input outside clip": (
        lambda: certify(IMAGES + 2.0, 0.1, clip=(0.0, 1.0)),
        ValueError,
        "clip range",
    ),
    "batch size 0": (lambda: certify(IMAGES, 0.1, batch_size=0), ValueError, "batch_size .*got 0"),
    "bytes 0": (lambda: certify(IMAGES, 0.1, max_bytes=0), ValueError, "max_bytes .*got 0"),
    "model output not 2-D": (
        lambda: bj.certify(lambda x: x.sum(1), IMAGES, 0.1),
        ValueError,
        r"logits \[B, C\].*got \(3,\)",
    ),
    "model output a tuple": (
        lambda: bj.certify(lambda x: (x, x), IMAGES, 0.1),
        ValueError,
        "logits .*got tuple",
    ),
    "model of another batch": (
        lambda: bj.certify(lambda x: x[:1], IMAGES, 0.1),
        ValueError,
        r"got \(1, 4\)",
    ),
    "model without classes": (
        lambda: bj.certify(lambda x: x[:, :0], IMAGES, 0.1),
        ValueError,
        "got 0",
    ),
    "model not callable": (
        lambda: bj.certify(3, IMAGES, 0.1),
        TypeError,
        "model must be .*got int",
    ),
    "model unbound": (
        lambda: bj.certify(nn.Dense(3), IMAGES, 0.1),
        TypeError,
        r"Dense has no variables; give \(module, variables\)",
    ),
    "radius: eps_max negative": (lambda: radius(IMAGES, eps_max=-1.0), ValueError, "eps.*got -1"),
    "radius: no steps": (lambda: radius(IMAGES, steps=0), ValueError, "steps must be >= 1, got 0"),
    "radius: labels": (
        lambda: radius(IMAGES, labels=np.array([9, 0, 0])),
        ValueError,
        "got 9 at index 0",
    ),
    "ball: eps": (lambda: bj.LpBall(ZEROS, -1.0), ValueError, r"eps must be .*got -1\.0"),
    "ball: norm": (lambda: bj.LpBall(ZEROS, 0.1, p=0), ValueError, "norm's order.*got 0"),
    "ball: norm nan": (lambda: bj.LpBall(ZEROS, 0.1, p=np.nan), ValueError, "got nan"),
    "ball: center": (lambda: bj.LpBall(ZEROS * np.nan, 0.1), ValueError, "center must be finite"),
    "ball: eps shape": (
        lambda: bj.LpBall(ZEROS, np.ones(2)).interval(),
        ValueError,
        r"eps must be .*\(3,\).*got shape \(2,\)",
    ),
    "box: order": (
        lambda: bj.Box(ZEROS + 1.0, ZEROS),
        ValueError,
        r"lower <= upper, got 1\.0 > 0\.0",
    ),
    "box: shapes": (lambda: bj.Box(ZEROS, jnp.ones(2)), ValueError, r"one shape.*\(3,\).*\(2,\)"),
    "box: nan": (lambda: bj.Box(ZEROS * np.nan, ZEROS), ValueError, "must be finite"),
    "linear: slopes": (
        lambda: bj.linear(model, slopes="adaptiv"),
        ValueError,
        "slopes must be one of .*adaptive.*got 'adaptiv'",
    ),
    "linear: slopes' type": (lambda: bj.linear(model, slopes=[3]), TypeError, "slopes .*got list"),
    "linear: slopes missing": (
        lambda: bj.linear(jax.nn.relu, slopes={})(bj.Box(-np.ones(2), np.ones(2))),
        KeyError,
        "need an entry for 'relu'",
    ),
    "linear: slopes of an unknown op": (
        lambda: bj.linear(jax.nn.relu, slopes={"rely": ZEROS})(identity_box),
        KeyError,
        "'rely' for no op; known: relu",
    ),
    "linear: intermediate": (
        lambda: bj.linear(model, intermediate="crown"),
        ValueError,
        "intermediate must be one of interval, linear, .*got 'crown'",
    ),
    "linear: sides": (lambda: bj.linear(model, sides="left"), ValueError, "sides .*got 'left'"),
    "linear: bytes": (lambda: bj.linear(model, max_bytes=0), ValueError, "max_bytes .*got 0"),
    "linear: rows": (lambda: bj.linear(model, max_rows=0), ValueError, "max_rows .*got 0"),
    "specification": (
        lambda: bj.linear(lambda x: 2.0 * x)(identity_box, jnp.ones((2, 4))),
        ValueError,
        r"specification must have shape \[m, 3\].*got \(2, 4\)",
    ),
    "specification of a pytree": (
        lambda: bj.interval(lambda x: (x, x))(identity_box, jnp.ones((2, 3))),
        ValueError,
        "one output",
    ),
    "specification rows": (
        lambda: bj.margin_specification(jnp.array([0]), 3, rows="some"),
        ValueError,
        "rows must be 'others' or 'all', got 'some'",
    ),
    "pgd: eps": (
        lambda: pgd(model, IMAGES, jnp.zeros(3, int), -0.1, key=jax.random.key(0)),
        ValueError,
        r"eps .*-0\.1",
    ),
    "pgd: loss": (
        lambda: pgd(model, IMAGES, jnp.zeros(3, int), 0.1, key=jax.random.key(0), loss="l2"),
        ValueError,
        "loss .*'l2'",
    ),
    "pgd: norm": (
        lambda: pgd(model, IMAGES, jnp.zeros(3, int), 0.1, key=jax.random.key(0), norm=1),
        ValueError,
        "norms 2 and inf, got norm=1",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_clear_line(case):
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_every_position_of_a_bad_radius_is_caught():
    for index in range(3):
        eps = np.full(3, 0.1)
        eps[index] = np.nan
        with pytest.raises(ValueError, match=f"at index {index}"):
            certify(IMAGES, eps)
