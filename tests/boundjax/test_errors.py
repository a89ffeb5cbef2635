"""Bad input: one line that says what was expected, what came and what to do."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.attacks import pgd

pytestmark = pytest.mark.quick

IMAGES = np.random.default_rng(0).uniform(size=(3, 4)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def model(x):
    return x @ jnp.asarray(KERNEL)


certify = functools.partial(bj.certify, model)
radius = functools.partial(bj.certified_radius, model)
nan_image = np.where(np.arange(12).reshape(3, 4) == 5, np.float32(np.nan), IMAGES)
half = nn.Sequential([nn.Dense(6, dtype=jnp.bfloat16), nn.relu, nn.Dense(3, dtype=jnp.bfloat16)])
HALF = half, half.init(jax.random.key(0), IMAGES)
identity_box = bj.Box(jnp.zeros(3), jnp.ones(3))
ZEROS = jnp.zeros(3)

# The call, the type of the error, and what its message must say.
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
    "norm as a string": (
        lambda: certify(IMAGES, 0.1, norm="inf"),
        TypeError,
        r"norm must be a number.*jax\.numpy\.inf\), got 'inf'",
    ),
    "radius: norm as a string": (lambda: radius(IMAGES, norm="2"), TypeError, "norm .*got '2'"),
    "memory: norm as a string": (
        lambda: bj.memory_estimate(model, IMAGES, norm="2"),
        TypeError,
        "norm .*got '2'",
    ),
    "norm as a truth value": (lambda: certify(IMAGES, 0.1, norm=True), TypeError, "got True"),
    "inputs as a dict": (
        lambda: certify({"a": IMAGES, "b": IMAGES}, 0.1),
        TypeError,
        "x must be one array, got a dict; .*concatenate",
    ),
    "inputs as a set": (
        lambda: certify(bj.LpBall(IMAGES, 0.1), 0.1),
        TypeError,
        r"x must be the inputs \[B, \.\.\.\], .*got a LpBall; .* use boundjax\.linear\(f\)",
    ),
    "inputs as a list of sets": (
        lambda: certify([identity_box, identity_box], 0.1),
        TypeError,
        r"x must be one array, got a list; .*boundjax\.linear",
    ),
    "inputs as a tuple": (
        lambda: certify((IMAGES, IMAGES[:, :2]), 0.1),
        TypeError,
        "x must be one array, got a tuple",
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
        "at least two logits per example, got 0",
    ),
    "model with one class": (
        lambda: bj.certify(lambda x: x[:, :1], IMAGES, 0.1),
        ValueError,
        r"at least two logits per example, got 1.*zeros_like.*boundjax\.linear",
    ),
    "model in half precision": (
        lambda: bj.certify(HALF, IMAGES, 0.1),
        bj.UnsupportedOpError,
        r"computes in bfloat16.*only float32.*dtype=jnp\.float32",
    ),
    "model with a half-precision product": (
        lambda: bj.certify(
            lambda x: jnp.dot(x, KERNEL, preferred_element_type=jnp.float16), IMAGES, 0.1
        ),
        bj.UnsupportedOpError,
        "computes in float16",
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
    "radius: pattern negative": (
        lambda: radius(IMAGES, pattern=[1.0, -1.0, 0.0, 0.0]),
        ValueError,
        r"pattern must be finite and >= 0, got -1\.0 at index 1",
    ),
    "radius: pattern of a wrong shape": (
        lambda: radius(IMAGES, pattern=np.ones(3)),
        ValueError,
        r"pattern must broadcast to x of shape \(3, 4\), got shape \(3,\); .*is \(4,\)",
    ),
    "radius: labels": (
        lambda: radius(IMAGES, labels=np.array([9, 0, 0])),
        ValueError,
        "got 9 at index 0",
    ),
    "ball: eps": (lambda: bj.LpBall(ZEROS, -1.0), ValueError, r"eps must be .*got -1\.0"),
    "ball: norm as a string": (lambda: bj.LpBall(ZEROS, 0.1, p="inf"), TypeError, "p .*'inf'"),
    "ball: radii of another structure": (
        lambda: bj.LpBall({"a": ZEROS}, {"b": 0.1}).interval(),
        ValueError,
        r"eps must be a number or have the structure .*\{'a': float32\[3\]\}, got \{'b': float\}",
    ),
    "ball: one array of radii for a dict": (
        lambda: bj.LpBall({"a": ZEROS, "b": ZEROS}, 0.1 + ZEROS).interval(),
        ValueError,
        r"eps must be a number or have the structure .*got one array of shape \(3,\)",
    ),
    "ball: radius in a dict": (
        lambda: bj.LpBall({"a": ZEROS}, {"a": -1.0}),
        ValueError,
        r"eps\['a'\] must be finite and >= 0, got -1\.0",
    ),
    "ball: center in a dict": (
        lambda: bj.LpBall({"a": ZEROS * np.nan}, 0.1),
        ValueError,
        r"LpBall\.center\['a'\] must be finite",
    ),
    "ball: two dtypes": (
        lambda: bj.LpBall({"a": ZEROS, "b": ZEROS.astype(jnp.bfloat16)}, 0.1, 2).interval(),
        TypeError,
        "one floating dtype, got bfloat16 and float32 in .*astype",
    ),
    "box: different keys": (
        lambda: bj.Box({"a": ZEROS}, {"b": ZEROS}),
        ValueError,
        r"one structure, got lower \{'a': float32\[3\]\} and upper \{'b': float32\[3\]\}",
    ),
    "box: a dict and an array": (
        lambda: bj.Box({"a": ZEROS}, ZEROS),
        ValueError,
        r"one structure, got lower \{'a': float32\[3\]\} and upper float32\[3\]",
    ),
    "box: shapes in a tuple": (
        lambda: bj.Box((ZEROS, ZEROS[:2]), (ZEROS, ZEROS)),
        ValueError,
        r"one shape, got lower\[1\] \(2,\) and upper\[1\] \(3,\)",
    ),
    "box: order in a dict": (
        lambda: bj.Box({"a": ZEROS + 1.0}, {"a": ZEROS}),
        ValueError,
        r"lower\['a'\] <= upper\['a'\], got 1\.0 > 0\.0 at index 0",
    ),
    "ball and box: a dict and arrays": (
        lambda: bj.BallBox({"a": ZEROS}, 0.1, ZEROS, ZEROS),
        ValueError,
        r"BallBox needs pytrees of one structure, got center \{'a': float32\[3\]\}",
    ),
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
        "expects norm=2 or norm=inf, got norm=1",
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


TRANSFORMS = {
    "interval": bj.interval,
    "linear": bj.linear,
    "relax": bj.relax,
    "forward_linear": bj.forward_linear,
    "lipschitz": bj.lipschitz,
    "estimate": lambda f: bj.estimate(f, jax.random.key(0)),
}
NO_SETS = {
    "an array": (ZEROS, r"expected an input set, got an array of shape \(3,\).*LpBall\(x, eps\)"),
    "a numpy array": (np.zeros(3), r"got an array of shape \(3,\).*Box\(lower, upper\)"),
    "a dict of arrays": (
        {"a": ZEROS, "b": 1},
        r"expected an input set in the pytree, got \{'a': float32\[3\], 'b': int\}; .*LpBall",
    ),
    "an empty dict": ({}, r"expected an input set in the pytree, got \{\}"),
    "an interval among sets": (
        {"a": identity_box, "b": bj.Interval(ZEROS, ZEROS)},
        r"expected an input set at \['b'\], got an Interval; use boundjax\.Box",
    ),
    "a threat": (bj.Threat(0.1), r"got a Threat, which makes one from an input: threat\(x\)"),
    "a threat among sets": ((identity_box, bj.Threat(0.1)), r"input set at \[1\], got a Threat"),
    "two dtypes": (
        {"a": identity_box, "b": bj.LpBall(ZEROS.astype(jnp.bfloat16), 0.1)},
        r"one floating dtype, got bfloat16 and float32 in \{'a': Box, 'b': LpBall\}; .*astype",
    ),
    "an interval": (bj.Interval(ZEROS, ZEROS), r"got an Interval; use boundjax\.Box"),
    "a number": (0.1, "expected an input set .*, got float"),
    "nothing": (None, "expected an input set .*, got NoneType"),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", NO_SETS)
def test_what_is_no_input_set_gives_one_clear_line(kind, transform):
    value, message = NO_SETS[kind]
    with pytest.raises(TypeError, match=message) as raised:
        TRANSFORMS[transform](jax.nn.relu)(value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_half_precision_input_set_names_the_cure(transform):
    half_box = bj.Box(ZEROS.astype(jnp.bfloat16), ZEROS.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match=r"float32 or float64, got bfloat16.*astype"):
        TRANSFORMS[transform](jax.nn.relu)(half_box)
