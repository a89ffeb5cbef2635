"""Stated errors of elementwise functions: which ops have one, what it is, whether it holds."""

import dataclasses
import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.ir import table
from boundjax.ir.families import Scalar
from boundjax.ops import accuracy, accuracy_cases
from boundjax.ops.accuracy import Accuracy
from boundjax.ops.accuracy_cases import CASES
from boundjax.sets.rounding import Arithmetic
from boundjax.tracing import trace

SINGLE = accuracy.SINGLE
each_case = pytest.mark.parametrize("name", CASES)
EXACT = {name for name, case in CASES.items() if not case.stated.ulp}
# Some versions of XLA simplify the root of a square. XLA's expm1 is ten times as accurate as
# onnxruntime's elu (`tests/experiments/test_ulps.py`), for which the stated error allows.
# A remainder is exact, but a bound on it with a rounded divisor would have no proof.
LENIENT = {"squareplus(0)", "elu", "elu(1.7)", "celu(1.7)", "selu", "rem"}
ROUNDED = sorted(set(CASES) - EXACT - LENIENT)


def stated(function, dtype=jnp.float32, shape=(3,)):
    """The stated errors of a function's elementwise nodes, in evaluation order."""
    with jax.enable_x64(dtype == jnp.float64):
        nodes = trace.trace(function, jnp.ones(shape, dtype)).nodes
        return [accuracy.accuracy(node) for node in nodes if isinstance(node.op, Scalar)]


def test_every_elementwise_op_has_a_stated_error():
    names = {op.name for op in table.all_ops() if isinstance(op, Scalar)}
    with_error = set(accuracy.STATED) | set(accuracy.BY_CONSTANTS)
    assert with_error == names
    assert not set(accuracy.STATED) & set(accuracy.BY_CONSTANTS)
    # Only selections and steps have a stated error that no case measures.
    missing = with_error - {case.op for case in CASES.values()}
    steps = {"ceil", "floor", "sign"}
    # `test_remainders.py` compares these where they do not jump.
    rounded = {"hinge", "pieces", "remainder", "floor_divide"}
    selections = {"clamp", "convert_element_type", "max", "min", "trunc", "whole"}
    assert missing == selections | steps | rounded
    assert all(accuracy.STATED[name] == accuracy.EXACT for name in missing - rounded)


@pytest.fixture(scope="module")
def shares():
    """The largest share of every stated error, computed once."""
    measured = {}

    def share(name):
        if name not in measured:
            measured[name] = accuracy_cases.largest_share(CASES[name])
        return measured[name]

    return share


@each_case
def test_functions_stay_below_half_of_what_is_stated(name, shares):
    assert shares(name) <= 0.5


@pytest.mark.parametrize("name", ROUNDED)
def test_a_tenth_of_what_is_stated_would_not_pass(name, shares):
    assert 10.0 * shares(name) > 0.5


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("exp2", "exponent"),
        ("sinh", "exponent"),
        ("cosh", "exponent"),
        ("erfc", "absolute"),
        ("gelu", "operand"),
        ("squareplus", "operand"),
        ("sqrt", "absolute"),
        ("pow(0.1)", "absolute"),
        ("relu", "underflow"),
    ],
)
def test_each_part_of_a_stated_error_counts(name, field):
    case = CASES[name]
    lowered = case.stated._replace(**{field: 0.1 * getattr(case.stated, field)})
    assert accuracy_cases.largest_share(dataclasses.replace(case, stated=lowered)) > 0.5


@pytest.mark.parametrize("name", sorted(EXACT))
def test_selections_are_exact(name, shares):
    assert shares(name) == 0.0


@each_case
def test_a_traced_function_has_the_error_that_was_compared(name):
    case = CASES[name]
    assert stated(case.function)[-1] == case.stated


@pytest.mark.parametrize(
    ("function", "factors"),
    [
        (lambda a, b: jnp.exp(a) * jnp.exp(b), lambda a, b: (a, b)),
        (lambda a, b: jnp.exp(a) / jnp.exp(-b), lambda a, b: (a, b)),
        (lambda a, b: jax.lax.integer_pow(jnp.exp(0.5 * a), 3), lambda a, b: (0.5 * a,) * 3),
    ],
)
def test_exponentials_pay_for_sums_of_exponents(function, factors):
    """Older XLA multiplies exponentials by adding their exponents, and rounds that sum."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(20.0, 40.0, (2, 4096)).astype(np.float32)
    exponents = factors(a.astype(np.float64), b.astype(np.float64))
    exact = np.exp(sum(exponents))

    def paid(of_exp):
        """The sum of the relative errors of the factors and of their product."""
        errors = (of_exp.error(x, 1.0, SINGLE) for x in exponents)
        return sum(errors) + len(exponents) * SINGLE.unit

    stated_error = accuracy.STATED["exp"]
    computed = np.asarray(jax.jit(function)(a, b)).astype(np.float64)
    assert (np.abs(computed / exact - 1.0) <= 0.5 * paid(stated_error)).all()
    # The most accurate result that a program which adds exponents can reach.
    rewritten = np.exp(sum(x.astype(np.float32) for x in exponents).astype(np.float64))
    off = np.abs(rewritten / exact - 1.0)
    assert (off <= 0.5 * paid(stated_error)).all()
    assert (off > paid(stated_error._replace(exponent=0.0))).any()


def test_float64_has_at_least_eight_ulp():
    assert stated(jnp.exp, jnp.float64) == [Accuracy(8.0, exponent=1.0)]
    assert stated(jax.nn.mish, jnp.float64) == [accuracy.STATED["mish"]]
    assert stated(jax.nn.relu, jnp.float64) == [accuracy.EXACT]


def test_log1p_in_float64_is_off_by_more_than_a_hundred_ulp():
    """A bug of XLA. Once it is fixed, the table's error is merely larger than needed."""
    (of_log1p,) = stated(jnp.log1p, jnp.float64)
    x = np.linspace(-0.5, -0.3, 1001)
    with jax.enable_x64(True):
        computed = np.asarray(jax.jit(jnp.log1p)(x))
    exact = np.log1p(x)
    error = of_log1p.error(x, exact, Arithmetic.of(np.float64))
    assert (np.abs(computed - exact) <= 0.5 * error).all()


@pytest.mark.parametrize("name", ["exp", "exp2", "tanh", "logistic", "erfc", "sinh", "gelu"])
def test_functions_in_float64_keep_within_the_assumption(name):
    case, arithmetic = CASES[name], Arithmetic.of(np.float64)
    (of_function,) = stated(case.function, jnp.float64)
    x = np.concatenate([np.linspace(-700, 700, 4001), np.linspace(-6, 6, 4001)])
    with jax.enable_x64(True):
        computed = np.asarray(jax.jit(case.function)(x))
    with np.errstate(over="ignore"):
        exact = case.reference(x)
    holds = of_function.holds(x, x, exact, arithmetic)
    assert holds.sum() > 5000
    error = np.abs(computed - exact)
    assert (error <= of_function.error(x, exact, arithmetic))[holds].all()


def test_constants_decide():
    x = jnp.ones(3)
    assert stated(lambda x: x**0.5)[-1] == accuracy.of_power(0.5)
    assert stated(lambda x: x**5) == [accuracy.of_integer_power(5)]
    assert stated(lambda x: 1.0 / x)[-1] == accuracy.of_integer_power(-1)
    slopes = stated(lambda y: jnp.where(y > 0, 3.0 * y, -5.0 * y))[-1]
    assert (slopes.ulp, slopes.underflow) == (2.0, 10.0)
    per_element = stated(lambda y: jnp.where(y > 0, y, jnp.arange(3.0) * y))[-1]
    np.testing.assert_array_equal(per_element.underflow, [3.0, 4.0, 5.0])
    # The slope is a traced value.
    jax.jit(lambda slope: stated(lambda y: jnp.where(y > 0, y, slope * y))[-1].underflow)(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.nn.celu(x, -1.0),
        lambda x: jax.nn.celu(x, 1e30),
        lambda x: jax.nn.squareplus(x, 1e30),
        lambda x: x ** jnp.asarray([0.5, 1.5, 2.5]),
    ],
)
def test_functions_without_a_stated_error(function):
    assert stated(function)[-1] is None


def test_constants_that_are_not_yet_known_leave_no_stated_error():
    def of_parameter(function):
        return jax.jit(lambda p: stated(lambda x: function(x, p))[-1] or p)(jnp.float32(0.5))

    for function in (jnp.power, jax.nn.celu, jax.nn.squareplus):
        assert float(of_parameter(function)) == 0.5


def test_only_elementwise_nodes_have_stated_errors():
    nodes = trace.trace(lambda x: jnp.exp(x) * x + 1.0, jnp.ones(3)).nodes
    errors = [accuracy.accuracy(node) for node in nodes]
    assert [node.primitive for node in nodes if node.op and accuracy.accuracy(node)] == ["exp"]
    assert errors[0] is None
    exp = next(node for node in nodes if node.primitive == "exp")
    half = dataclasses.replace(exp, dtype=np.dtype(np.float16))
    assert accuracy.accuracy(half) is None


def test_powers():
    assert accuracy.of_power(math.inf) is None
    assert accuracy.of_power(math.nan) is None
    assert accuracy.of_power(0.0) == accuracy.EXACT
    assert accuracy.of_power(-0.5).domain == (2.0**-126, math.inf)
    assert accuracy.of_integer_power(2**25) is None
    # In float64 underflow costs a root less, unless the exponent is tiny.
    assert accuracy.of_power(0.5, np.float64).absolute < accuracy.of_power(0.5).absolute


def test_the_error_is_the_formula():
    every_field = Accuracy(4.0, absolute=3.0, operand=5.0, exponent=7.0, underflow=9.0)
    u, nu = fractions.Fraction(1, 2**24), fractions.Fraction(1, 2**126)
    z, f = fractions.Fraction(3, 4), fractions.Fraction(-5, 2)
    exact = 2 * u * (4 + 7 * z) * abs(f) + 2 * u * 5 * z + 3 * u + 9 * nu
    for sign in (1, -1):
        computed = every_field.error(sign * float(z), float(f), SINGLE)
        assert computed == pytest.approx(float(exact), rel=1e-14)
    of_arrays = jax.jit(lambda z, f: every_field.error(z, f, SINGLE))
    array = of_arrays(jnp.float32([0.75, 0.0]), jnp.float32([-2.5, 0.0]))
    assert array.dtype == jnp.float32
    np.testing.assert_allclose(array, [float(exact), 3 * 2.0**-24], rtol=1e-6)
    # The error of underflow remains even where all other errors are 0.
    assert accuracy.EXACT.error(0.0, 0.0, SINGLE) == 2.0 * 2.0**-126


def test_unbounded_values_have_unbounded_errors():
    infinity = jnp.float32([jnp.inf])
    for entry in accuracy.STATED.values():
        error = entry.error(infinity, infinity, SINGLE)
        assert np.all(error == np.inf) if entry.ulp else np.all(np.isfinite(error))
    # A bounded function has a finite error even at an unbounded operand.
    assert jnp.isfinite(accuracy.STATED["tanh"].error(infinity, jnp.ones(1), SINGLE)).all()
    assert jnp.isnan(accuracy.STATED["exp"].error(1.0, jnp.float32(jnp.nan), SINGLE))


def test_where_errors_are_stated():
    of_log = accuracy.STATED["log"]
    lower = np.float32([2.0**-126, 2.0**-127, 0.0, -1.0, np.nan, 1.0, 1.0, 1.0])
    upper = np.float32([1.0, 1.0, 1.0, 1.0, 1.0, np.nan, 1.0, 1.0])
    value = np.float32([88.0, 88.0, 88.0, 88.0, 1.0, 1.0, np.nan, 3e38])
    expected = [True, *[False] * 7]
    np.testing.assert_array_equal(of_log.holds(lower, upper, value, SINGLE), expected)
    traced = jax.jit(lambda *arrays: of_log.holds(*arrays, SINGLE))(lower, upper, value)
    # A compiled program flushes the subnormal number to 0, which is outside the domain, too.
    np.testing.assert_array_equal(traced, expected)


def test_shares_see_every_kind_of_wrong_value():
    case = CASES["exp"]
    x = np.zeros(5, np.float32)
    wrong = np.float32([1.0, np.nan, np.inf, -1.0, 1.0 + 8 * 2.0**-24])
    np.testing.assert_allclose(
        case.shares(x, wrong), [0.0, np.inf, np.inf, 2.0**24 / 4.0, 1.0], rtol=1e-6
    )
    # The stated error makes no promise beyond the largest value it names.
    assert case.shares(np.float32([89.0]), np.float32([np.inf])) == 0.0
    assert case.shares(np.zeros(0, np.float32), np.zeros(0, np.float32)).shape == (0,)
    assert CASES["relu"].shares(np.float32([1.0]), np.float32([1.0 + 2.0**-23])) == np.inf


def test_special_inputs_hold_the_ends_of_the_range():
    special = accuracy_cases.special_inputs()
    assert np.isfinite(special).all()
    for number in (0.0, 2.0**-149, 2.0**-126, 1.0, np.finfo(np.float32).max, np.float32(np.pi)):
        assert (special == number).any()
        assert (special == -number).any()
    assert np.signbit(special[special == 0]).any()


def test_a_machine_is_checked_also_while_jax_traces():
    def function(x):
        assert accuracy_cases.check_on_this_machine("tanh")
        assert accuracy_cases.check_on_this_machine("pow", 0.7)
        return jnp.tanh(x)

    with jax.debug_nans(True), jax.debug_infs(True):
        jax.jit(jax.vmap(function))(jnp.ones((2, 3)))


def test_a_machine_whose_functions_are_off_does_not_pass(monkeypatch):
    case = CASES["softplus"]
    off = dataclasses.replace(case, function=lambda x: case.function(x) * (1.0 + 2.0**-19))
    monkeypatch.setattr(accuracy_cases, "CASES", {"softplus": off})
    accuracy_cases._keeps.cache_clear()
    assert not accuracy_cases.check_on_this_machine("softplus")
    accuracy_cases._keeps.cache_clear()


def test_a_jaxlib_that_nobody_measured_is_checked_at_first_use(monkeypatch):
    asked = []

    def check(name, exponent=None):
        asked.append((name, exponent))
        return name != "log"

    def bounds(function):
        return jax.jit(bj.linear(function, rounding="real"))(bj.Box(jnp.ones(3), jnp.ones(3)))

    monkeypatch.setattr(accuracy_cases, "check_on_this_machine", check)
    bounds(jnp.tanh)
    assert asked == []
    monkeypatch.setattr(accuracy_cases, "_jaxlib_version", lambda: "99.0")
    bounds(lambda x: jnp.maximum(jnp.tanh(x) ** 3, x**0.5))
    assert asked == [("tanh", None), ("integer_pow", 3.0), ("pow", 0.5)]
    with pytest.raises(bj.NoProofError, match=r"'log' of jaxlib 99\.0 is less accurate"):
        bounds(jax.nn.log_softmax)


def test_an_unmeasured_jaxlib_may_keep_within_the_stated_errors(monkeypatch):
    monkeypatch.setattr(accuracy_cases, "_jaxlib_version", lambda: "99.0")
    assert jax.jit(bj.interval(jnp.tanh, rounding="real"))(bj.Box(jnp.ones(3), jnp.ones(3)))


@pytest.mark.parametrize(
    ("name", "exponent", "message"),
    [
        ("sort", None, "expected an op with a stated error, got 'sort'"),
        ("exp", 2.0, "expected an exponent of pow or integer_pow only, got one of 'exp'"),
        ("integer_pow", 2.5, "expected an integer exponent of integer_pow, got 2.5"),
        ("pow", math.inf, "expected a constant for which pow has a stated error"),
    ],
)
def test_checks_of_other_names_are_errors(name, exponent, message):
    with pytest.raises(ValueError, match=message) as error:
        accuracy_cases.check_on_this_machine(name, exponent)
    assert "\n" not in str(error.value)
