"""Formulas as SMT-LIB writers state them: connectives, strict signs, and inputs together."""

import itertools
import operator
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from boundjax import vnnlib
from boundjax.search.network import weighed
from boundjax.search.programs import Programs
from boundjax.search.search import verify
from boundjax.vnnlib import VnnlibError

pytestmark = pytest.mark.quick

NAMES = ("X_0", "X_1", "Y_0", "Y_1")
HEAD = "(set-logic QF_LRA)\n(set-info :source |a (strange| )\n" + "".join(
    f"(declare-fun {name} () Real)" for name in NAMES
)
SIDES = "(assert (<= -1 X_0 1))(assert (and (>= X_1 -1) (>= 1 X_1)))"
SIGNS = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}


def random_formula(rng, depth):
    """A formula as text, and as a predicate on the values of the variables."""
    if depth == 0 or rng.uniform() < 0.25:
        sign = rng.choice(list(SIGNS))
        count = 1 if rng.uniform() < 0.6 else 2
        names = rng.choice(NAMES, count, replace=False)
        factors, constant = rng.choice([-1, 1, 2], count), Fraction(int(rng.integers(-2, 3)), 2)
        terms = " ".join(f"(* {f} {n})" for f, n in zip(factors, names, strict=True))
        square, pair = rng.choice(NAMES), rng.choice(NAMES, 2)
        quadratic = rng.uniform() < 0.2
        if quadratic:  # (a + 1)^2 - b c
            terms += f" (* (+ {square} 1) (+ 1 {square})) (- (* {pair[0]} {pair[1]}))"
        sides = [f"(+ 0 {terms})", f"(/ {constant.numerator} {constant.denominator})"]

        def atom(values):
            total = sum(int(f) * values[n] for f, n in zip(factors, names, strict=True))
            if quadratic:
                total += (values[square] + 1) ** 2 - values[pair[0]] * values[pair[1]]
            return SIGNS[sign](total, constant)

        return f"({sign} {' '.join(sides)})", atom
    head = rng.choice(["and", "or", "not", "=>"])
    count = 1 if head == "not" else int(rng.integers(2, 4))
    texts, predicates = zip(*(random_formula(rng, depth - 1) for _ in range(count)), strict=True)

    def holds(values):
        *others, last = [predicate(values) for predicate in predicates]
        if head == "not":
            return not last
        if head == "=>":
            return last or not all(others)
        return (all if head == "and" else any)([*others, last])

    return f"({head} {' '.join(texts)})", holds


def contains(property, inputs, outputs):
    """Whether a file asserts these values."""
    values = property.weighed(np.float32(outputs), np.float32(inputs))
    for case in property.cases:
        inside = (case.inner_lower <= inputs).all() and (inputs <= case.inner_upper).all()
        if inside and any(conjunction.contains(values) for conjunction in case.conjunctions):
            return True
    return False


REFUSALS = ("got a contradiction", "a false one", "got one without", "an empty box")


def read_or_refused(text):
    """The property of a file and None, or None and the message of its error."""
    try:
        return vnnlib.parse(text), None
    except VnnlibError as error:
        return None, str(error)


def test_random_formulas_hold_where_they_say():
    rng, halves = np.random.default_rng(0), np.arange(-2, 3) / 2
    points = list(itertools.product(halves, halves, [-1.0, 0.0, 0.5], [-0.5, 0.0, 1.0]))
    read, relations = 0, 0
    for _ in range(300):
        text, holds = random_formula(rng, 3)
        property, refusal = read_or_refused(HEAD + SIDES + f"(assert {text})(check-sat)(exit)")
        if property is None:
            # No point at all, or a part of the box whatever the outputs.
            assert any(reason in refusal for reason in REFUSALS), (text, refusal)
            if "got one without" not in refusal:
                assert not any(holds(dict(zip(NAMES, p, strict=True))) for p in points), text
            continue
        read, relations = read + 1, relations + property.on_inputs
        for point in points:
            expected = holds(dict(zip(NAMES, point, strict=True)))
            assert contains(property, np.float32(point[:2]), point[2:]) == expected, (text, point)
    assert read > 100
    assert relations > 50


def test_smtlib_and_vnnlib_are_read_alike():
    plain = vnnlib.parse(
        "".join(f"(declare-const {name} Real)" for name in NAMES)
        + SIDES.replace("(<= -1 X_0 1)", "(and (>= X_0 -1) (<= X_0 1))")
        + "(assert (<= Y_0 Y_1))"
    )
    other = vnnlib.parse(HEAD + SIDES + "(assert (not (> Y_0 Y_1)))(check-sat)")
    for ours, theirs in zip(plain.cases, other.cases, strict=True):
        np.testing.assert_array_equal(ours.lower, theirs.lower)
        np.testing.assert_array_equal(ours.upper, theirs.upper)
        np.testing.assert_array_equal(ours.conjunctions[0].weights, theirs.conjunctions[0].weights)
        assert ours.conjunctions[0].strict is theirs.conjunctions[0].strict is None


def test_strict_bounds_of_inputs_exclude_their_ends():
    (case,) = vnnlib.parse(
        HEAD + "(assert (< -1 X_0 1))(assert (< 0 X_1 0.1))(assert (<= Y_0 0))"
    ).cases
    np.testing.assert_array_equal(case.lower, np.float32([-1, 0]))
    np.testing.assert_array_equal(case.upper, np.float32([1, 0.1]))
    end = np.nextafter(np.float32(1), np.float32(0))
    tiny = np.finfo(np.float32).tiny
    np.testing.assert_array_equal(case.inner_lower, np.float32([-end, tiny]))
    below = np.nextafter(np.float32(0.1), np.float32(0))
    np.testing.assert_array_equal(case.inner_upper, np.float32([end, below]))


def difference(x):
    hidden = jnp.maximum(x @ jnp.float32([[1.0, 0.0], [0.0, 1.0]]), 0.0)
    return jnp.stack([hidden[0] - hidden[1], hidden[0] + hidden[1]])


VERDICTS = {
    # Without the relation Y_0 reaches 1.
    "(and (<= X_0 X_1) (>= Y_0 0.01))": "unsat",
    "(and (<= X_0 (+ X_1 0.25)) (>= Y_0 0.125))": "sat",
    "(and (<= X_0 (+ X_1 0.25)) (>= Y_0 0.26))": "unsat",
    "(and (= X_0 0.5) (< X_1 -0.5) (>= Y_1 0.5))": "sat",
    "(and (= X_0 0.5) (< X_1 -0.5) (>= Y_1 0.51))": "unsat",
    # A relation of inputs and outputs: |x|+ >= x.
    "(< (+ Y_1 0.01) (+ X_0 X_1))": "unsat",
    "(and (> Y_1 (+ X_0 X_1 0.5)) (> X_0 0))": "sat",
    "(or (and (<= X_0 X_1) (>= Y_0 0.01)) (and (>= X_0 X_1) (<= Y_0 -0.01)))": "unsat",
    "(=> (<= Y_1 1) (>= Y_1 3))": "sat",
    "(not (or (<= Y_1 2.01) (<= Y_0 2)))": "unsat",
    # Products: the hidden values have |Y_0| <= Y_1.
    "(> (* Y_0 Y_0) (+ (* Y_1 Y_1) 0.01))": "unsat",
    "(>= (* X_0 X_1) 0.99)": "sat",
    "(and (>= (* X_0 X_1) 1.01) (>= Y_1 0))": "unsat",
    # The largest value is 2: attained, but not exceeded.
    "(>= Y_1 2)": "sat",
    "(> Y_1 2)": None,
    "(> Y_0 1)": None,
}


@pytest.fixture(scope="module")
def programs():
    made = {}

    def of(property):
        key = property.products if property.on_inputs else None
        if key not in made:
            function = difference if key is None else weighed(difference, key)
            made[key] = Programs(function, (2,))
        return made[key]

    return of


@pytest.mark.parametrize("max_split_inputs", [20, 0], ids=["the box is split", "units are split"])
@pytest.mark.parametrize("formula", VERDICTS)
def test_verdicts(formula, max_split_inputs, programs):
    property = vnnlib.parse(HEAD + SIDES + f"(assert {formula})")
    result = verify(
        difference,
        property,
        method="complete",
        timeout=20.0 if VERDICTS[formula] else 2.0,
        programs=programs(property),
        max_split_inputs=max_split_inputs,
    )
    if VERDICTS[formula] is None:  # float32 bounds do not tell a tie from a violation
        assert result.verdict in ("unsat", "unknown", "timeout")
    elif max_split_inputs == 0 and property.products and VERDICTS[formula] == "unsat":
        assert result.verdict in ("unsat", "unknown")  # a product has no units to split
    else:
        assert result.verdict == VERDICTS[formula]
    if result.verdict == "sat":
        point = result.counterexample
        assert contains(property, point.inputs, np.asarray(point.outputs)[:2])
        np.testing.assert_allclose(point.outputs[:2], difference(point.inputs), rtol=1e-6)


def test_a_property_needs_programs_that_give_what_it_weighs(programs):
    property = vnnlib.parse(HEAD + SIDES + "(assert (<= X_0 Y_0))")
    with pytest.raises(ValueError, match="the model has 0 outputs, but the property declares 2"):
        verify(difference, property, programs=Programs(difference, (2,)))
    with pytest.raises(ValueError, match="inputs without constraints"):
        verify(
            difference, property, programs=programs(property), method="complete", with_proof=True
        )
