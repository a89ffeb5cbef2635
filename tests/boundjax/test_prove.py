"""`prove`: any function, a box, a property of the outputs; properties and their combinations."""

import functools
import itertools
from fractions import Fraction

import jax
import numpy as np
import pytest
from jax import nn
from jax import numpy as jnp

import boundjax as bj
from boundjax import properties, search
from boundjax.search import proof
from boundjax.sets import rounding

pytestmark = [pytest.mark.xdist_group("prove"), pytest.mark.quick]

SHAPE, OUTPUTS = (2, 3), 3


def network(x):
    """`[2, 3] -> [3]`, with random weights."""
    rng = np.random.default_rng(1)
    x = x.reshape(-1)
    for inputs, outputs in itertools.pairwise((6, 10, 10)):
        kernel = rng.normal(size=(inputs, outputs)) * (2.0 / inputs) ** 0.5
        x = nn.relu(x @ jnp.asarray(kernel, jnp.float32) + 0.1)
    return x @ jnp.asarray(rng.normal(size=(10, OUTPUTS)) / 3.0, jnp.float32)


@pytest.fixture(scope="module")
def programs():
    return search.Programs(network, SHAPE)


@pytest.fixture(scope="module")
def box():
    center = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    return bj.LpBall(center, 0.2)


@pytest.fixture(scope="module")
def least(box):
    """The exact minimum of every output over the box."""
    optima = [bj.milp_optimum(network, box, row) for row in np.eye(OUTPUTS)]
    assert all(optimum.status == "optimal" for optimum in optima)
    return np.array([optimum.lower for optimum in optima])


@pytest.mark.parametrize("max_split_inputs", [0, 20], ids=["units are split", "the box is split"])
def test_verdicts_and_margins_beside_exact_optima(max_split_inputs, programs, box, least):
    decide = functools.partial(
        bj.prove, network, box, programs=programs, max_split_inputs=max_split_inputs
    )
    rows = np.eye(OUTPUTS)
    proved = decide(properties.all_positive(rows, 1e-3 - least))
    assert proved.proved
    assert proved.verdict == "unsat"
    assert proved.counterexample is None
    # The margins are lower bounds, and the optima are 1e-3.
    assert (proved.margins > 0).all()
    assert (proved.margins < 1e-3 + 1e-5).all()
    # One row that is not positive everywhere is enough.
    offset = 1e-3 - least
    offset[1] -= 0.02
    broken = decide(properties.all_positive(rows, offset))
    assert broken.verdict == "sat"
    assert not broken.proved
    assert broken.counterexample.inputs.shape == SHAPE
    assert broken.counterexample.outputs.shape == (OUTPUTS,)
    np.testing.assert_allclose(
        broken.counterexample.outputs, network(broken.counterexample.inputs), atol=1e-6
    )
    assert broken.counterexample.outputs[1] + offset[1] <= 0


def test_one_of_several_rows(programs, box, least):
    rows = np.eye(OUTPUTS)
    decide = functools.partial(bj.prove, network, box, programs=programs)
    one = properties.any_positive(rows, np.full(OUTPUTS, -50.0) - least)
    assert decide(one).verdict == "sat"
    held = properties.all_positive(rows[:1], 1e-3 - least[0])
    assert decide(one | held).proved
    assert decide(one & held).verdict == "sat"


def leaves(result):
    (case,) = result.proof.cases
    return [part for part in case.recorder.walk(case.roots[0], 0) if isinstance(part, proof.Leaf)]


def test_rows_of_a_conjunction_refute_boxes_together():
    """Their mean is positive everywhere, while each of them is only on half of the box."""
    rows, box = np.float32([[1.0], [-1.0]]), bj.Box(-jnp.ones(1), jnp.ones(1))
    decide = functools.partial(bj.prove, lambda x: 4.0 * x, box)
    result = decide(properties.any_positive(rows, [0.0, 1e-4]), with_proof=True)
    assert result.proved
    (leaf,) = leaves(result)
    np.testing.assert_allclose(leaf.mix, 0.5, atol=1e-5)
    np.testing.assert_allclose(result.margins, 5e-5, rtol=0.2)
    # Exactly at the edge, and just beyond it.
    assert decide(properties.any_positive(rows, [0.0, 0.0])).verdict == "sat"
    assert decide(properties.any_positive(rows, [0.0, -1e-4])).verdict == "sat"


def test_rows_of_different_sizes_together():
    """The best weights are 1 / 4 and 3 / 4; a second conjunction has one row."""
    rows, box = np.float32([[3.0], [-1.0]]), bj.Box(-jnp.ones(2), jnp.ones(2))
    both = properties.any_positive(rows, [0.0, 1e-3])
    one = properties.all_positive(np.ones((1, 1)), 2.001)
    result = bj.prove(lambda x: jnp.sum(x, keepdims=True), box, both & one, with_proof=True)
    assert result.proved
    np.testing.assert_allclose(result.margins, [0.75e-3, 1e-3], rtol=0.3)
    assert result.margins[0] <= 0.75e-3


def test_the_least_example():
    """`0.5 - relu(x)` is positive for `x <= 0` without the split's multiplier, but not at 1."""
    function = lambda x: 0.5 - nn.relu(x)  # noqa: E731
    box = bj.Box(-jnp.ones(1), jnp.ones(1))
    for max_split_inputs in (0, 20):
        decide = functools.partial(bj.prove, function, box, max_split_inputs=max_split_inputs)
        result = decide(properties.all_positive(np.eye(1)))
        assert result.verdict == "sat"
        assert result.counterexample.inputs[0] >= 0.5
        result = decide(properties.all_positive(np.eye(1), 0.51))
        assert result.proved
        np.testing.assert_allclose(result.margins, 0.01, atol=1e-4)


def test_a_counterexample_lies_in_the_exact_ball():
    """0.1 is no float32: `x + float32(0.1)` and the nearest `x + 0.1` may lie outside."""
    x = np.float32([0.3, -0.7, 1000.0, 2.0**-20, 0.0])
    threat = bj.Threat(0.1, clip=(-0.75, 2000.0))
    result = bj.prove(lambda x: x, threat(jnp.asarray(x)), properties.any_positive(-np.eye(5), -99))
    assert result.verdict == "sat"
    for value, middle in zip(result.counterexample.inputs.tolist(), x.tolist(), strict=True):
        assert abs(Fraction(value) - Fraction(middle)) <= Fraction(0.1)
        assert value >= -0.75


@pytest.mark.parametrize("eps", [0.0, 1e-9, 0.1, np.float32(0.1), 3.0])
def test_ends_inside_the_exact_ball(eps):
    center = np.random.default_rng(3).normal(size=50).astype(np.float32)
    center[:4] = 0.0, 1.0, 2.0**-140, 1e6
    lower, upper = rounding.inward_ends(center, eps, (-1.5, 1e5))
    for low, high, middle in zip(lower.tolist(), upper.tolist(), center.tolist(), strict=True):
        ends = [Fraction(middle) + s * Fraction(float(eps)) for s in (-1, 1)]
        ends = [min(max(end, Fraction(-1.5)), Fraction(10**5)) for end in ends]
        assert ends[0] <= Fraction(low) <= Fraction(high) <= ends[1]
        # No more than a spacing is lost.
        assert Fraction(low) - ends[0] <= Fraction(float(np.spacing(np.float32(abs(low) + 1e-30))))
        assert ends[1] - Fraction(high) <= Fraction(
            float(np.spacing(np.float32(abs(high) + 1e-30)))
        )
    narrow = rounding.inward_ends(np.float32([0.0]), 1.0, (0.1, 0.1))
    assert narrow[0] == narrow[1] == np.float32(0.1)


def test_a_point(programs):
    x = jnp.asarray(np.random.default_rng(4).normal(size=SHAPE), jnp.float32)
    value = np.asarray(network(x))
    decide = functools.partial(bj.prove, network, bj.LpBall(x, 0.0), programs=programs)
    assert decide(properties.all_positive(np.eye(OUTPUTS), 0.01 - value)).proved
    assert decide(properties.all_positive(np.eye(OUTPUTS), -0.01 - value)).verdict == "sat"


def test_the_cheap_methods_and_their_names(programs, box, least):
    easy = properties.all_positive(np.eye(OUTPUTS), 9.0 - least)
    result = bj.prove(network, box, easy, programs=programs, method="interval", max_split_inputs=0)
    assert result.proved
    # The margin is the bound on the whole box.
    assert (result.margins > 0).all()
    assert (result.margins <= 9.0).all()
    with pytest.raises(ValueError, match=r"method must be one of interval, .*complete, got 'milp'"):
        bj.prove(network, box, easy, programs=programs, method="milp")


def test_the_image_of_an_output_with_several_axes():
    function = lambda x: jnp.stack([x, 2.0 * x])  # noqa: E731
    rows = np.zeros((1, 2, 2))
    rows[0, 1, 0] = 1.0
    box = bj.Box(jnp.float32([0.5, -1.0]), jnp.float32([1.0, 1.0]))
    assert bj.prove(function, box, properties.all_positive(rows, -0.99)).proved
    result = bj.prove(function, box, properties.all_positive(rows, -1.01))
    assert result.counterexample.outputs.shape == (2, 2)
    assert result.counterexample.outputs[1, 0] <= 1.01


def test_nan_is_not_proved():
    function = lambda x: x * jnp.float32(np.nan)  # noqa: E731
    box = bj.Box(jnp.zeros(1), jnp.zeros(1))
    result = bj.prove(function, box, properties.all_positive(np.eye(1), 1e9), timeout=5.0)
    assert result.verdict == "unknown"
    assert result.margins.tolist() == [-np.inf]


ZERO = np.zeros(2, np.float32)
POSITIVE = properties.all_positive(np.eye(2))
REFUSALS = {
    "float64": (
        lambda: bj.prove(lambda x: x, bj.Box(np.zeros(2), np.ones(2)), POSITIVE),
        r"computes in float32, got an input set of float64; convert it with jnp.float32",
    ),
    "integers": (
        lambda: bj.prove(lambda x: x, bj.Box(np.zeros(2, int), ZERO), POSITIVE),
        r"got an input set of float32 and int64",
    ),
    "lists": (lambda: bj.prove(lambda x: x, bj.Box([0.0], [1.0]), POSITIVE), "of float64"),
    "l2": (
        lambda: bj.prove(lambda x: x, bj.LpBall(ZERO, 0.1, p=2), POSITIVE),
        r"needs a box, .* got LpBall with p = 2; .*Box\(\*input_set.interval\(\)\), holds for",
    ),
    "another set": (
        lambda: bj.prove(lambda x: x, bj.BallBox(ZERO, 1.0, ZERO, ZERO + 1.0), POSITIVE),
        "got BallBox; ",
    ),
    "a tree without sets": (
        lambda: bj.prove(lambda x: x, {"x": ZERO}, POSITIVE),
        r"input set in the pytree, got \{.x.: float32\[2\]\}; say what may be perturbed",
    ),
    "an array": (
        lambda: bj.prove(lambda x: x, ZERO, POSITIVE),
        "expected an input set, got an arr",
    ),
    "no elements": (
        lambda: bj.prove(lambda x: x, bj.Box(ZERO[:0], ZERO[:0]), POSITIVE),
        r"must have elements, got shape \(0,\)",
    ),
    "two results": (
        lambda: bj.prove(lambda x: (x, x), bj.Box(ZERO, ZERO), POSITIVE),
        "function must return one array, got tuple",
    ),
    "rows alone": (
        lambda: bj.prove(lambda x: x, bj.Box(ZERO, ZERO), np.eye(2)),
        r"property must be a function of the outputs, .*all_positive\(rows\), got ndarray",
    ),
    "other outputs": (
        lambda: bj.prove(lambda x: x, bj.Box(ZERO, ZERO), properties.predicts(0, 3)),
        "the model has 2 outputs, but the property declares 3",
    ),
    "timeout": (
        lambda: bj.prove(lambda x: x, bj.Box(ZERO, ZERO), POSITIVE, timeout=0.0),
        "timeout must be positive, in seconds, got 0",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_in_one_line(name):
    call, message = REFUSALS[name]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- properties -----------------------------------------------------------------------------------


def test_properties_hold_where_their_definitions_say():
    rng = np.random.default_rng(5)
    rows, offset = rng.normal(size=(3, 4)), rng.normal(size=3)
    every, some = properties.all_positive(rows, offset), properties.any_positive(rows, offset)
    label = properties.predicts(2, 4)
    seen = set()
    for y in rng.normal(size=(200, 4)).astype(np.float32):
        values = rows @ y + offset
        facts = [(values > 0).all(), (values > 0).any(), y.argmax() == 2]
        assert [p.holds(y) for p in (every, some, label)] == facts
        stated = zip((every, some, label), facts, strict=True)
        for (p, a), (q, b) in itertools.combinations(stated, 2):
            assert (p & q).holds(y) == (a and b)
            assert (p | q).holds(y) == (a or b)
        assert ((every & label) | some).holds(y) == facts[1]
        seen.add(tuple(facts))
    assert len(seen) > 4


def test_ties_and_nan_do_not_hold():
    assert not properties.predicts(0, 2).holds(np.float32([1.0, 1.0]))
    assert not properties.all_positive([[1.0]]).holds(np.float32([0.0]))
    assert not properties.all_positive([[1.0]]).holds(np.float32([np.nan]))
    assert properties.all_positive([[1.0]]).holds(np.float32([1e-45]))


def test_weights_may_have_the_shape_of_the_output():
    rows = np.arange(12.0).reshape(2, 2, 3)
    assert properties.all_positive(rows).output_size == 6
    assert properties.all_positive(rows).holds(np.ones((2, 3), np.float32))
    specification = bj.margin_specification(jnp.int32(1), 3)
    y = np.float32([0.0, 0.5, -1.0])
    assert properties.all_positive(specification).holds(y)
    assert properties.predicts(1, 3).holds(y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: properties.predicts(0, 1),
            "a label in 0..classes - 1 and two classes, got 0 of 1",
        ),
        (lambda: properties.predicts(3, 3), "got 3 of 3"),
        (lambda: properties.all_positive(np.ones(3)), r"weights must be \[R, \*out\].*got \(3,\)"),
        (lambda: properties.all_positive(np.ones((0, 3))), r"got \(0, 3\)"),
        (lambda: properties.any_positive(np.eye(2), np.ones(3)), r"\(2, 2\) and \(3,\)"),
        (lambda: properties.all_positive([[np.inf]]), "must be finite numbers"),
        (
            lambda: properties.predicts(0, 3) & properties.predicts(0, 2),
            r"one number of outputs, got 3 conjunctions of \[2, 3\]",
        ),
        (lambda: properties.OutputProperty(()), "got 0 conjunctions of none"),
    ],
)
def test_properties_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_networks_that_differ_in_weights_share_compiled_code(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        search.network.FlatNetwork, "stopped_clock", lambda self: _counting(compiled)
    )
    store, box = {}, bj.Box(jnp.full(3, -1.0), jnp.ones(3))
    for index, weight in enumerate((1.0, 2.0)):
        programs = search.Programs(
            lambda w, x: nn.relu(w * x), (3,), weights=jnp.float32(weight), compiled=store
        )
        before = len(compiled)
        decide = functools.partial(
            bj.prove, programs.network, box, programs=programs, max_split_inputs=0
        )
        assert decide(properties.all_positive(-np.eye(3), weight + 0.1)).proved
        assert decide(properties.all_positive(-np.eye(3), weight - 0.1)).verdict == "sat"
        assert (len(compiled) > before) == (index == 0)


class _counting:
    def __init__(self, calls):
        self.calls = calls

    def __enter__(self):
        self.calls.append(1)

    def __exit__(self, *_):
        return False


@pytest.mark.slow
def test_float32_networks_while_float64_is_enabled(box, least):
    with jax.enable_x64(True):
        for max_split_inputs in (0, 20):
            decide = functools.partial(bj.prove, network, box, max_split_inputs=max_split_inputs)
            assert decide(properties.all_positive(np.eye(OUTPUTS), 1e-3 - least)).proved
            assert decide(properties.all_positive(np.eye(OUTPUTS), -least - 0.02)).verdict == "sat"
