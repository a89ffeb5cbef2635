"""Properties as functions: comparisons read from a jaxpr, and proved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.tracing import statements
from boundjax.tracing.statements import statement_of

pytestmark = [pytest.mark.quick, pytest.mark.xdist_group("statements")]

X = jax.ShapeDtypeStruct((4,), jnp.float32)
POINTS = np.float32(np.stack(np.meshgrid(*[[-1.0, 0.0, 0.5]] * 4), -1).reshape(-1, 4))
MASK = np.array([True, False, True, True])


def random_property(rng, depth):
    """A combination of comparisons of four numbers."""
    if depth == 0 or rng.uniform() < 0.2:
        compare = rng.choice([jnp.less, jnp.less_equal, jnp.greater, jnp.greater_equal])
        if rng.uniform() < 0.3:
            compare = rng.choice([jnp.equal, jnp.not_equal])
        i, j = rng.choice(4, 2, replace=False)
        offset = np.float32(rng.choice([-0.5, 0.0, 0.5]))
        return lambda y: compare(y[i] - offset, y[j])
    parts = [random_property(rng, depth - 1) for _ in range(2)]
    kind = rng.choice(["and", "or", "not", "xor", "all", "any"])

    def combined(y):
        first, second = (part(y) for part in parts)
        return {
            "and": lambda: first & second,
            "or": lambda: first | second,
            "not": lambda: ~first,
            "xor": lambda: first ^ second,
            "all": lambda: jnp.all(jnp.stack([first, second])),
            "any": lambda: jnp.stack([first, second, first]).any(),
        }[kind]()

    return combined


def holds(statement, x):
    """Whether a statement holds by its differences."""
    d = np.asarray(statement.differences(jnp.asarray(x)))

    def is_below(literal):
        value = literal.sign * d[literal.index]
        return value < 0 if literal.strict else value <= 0

    return not any(all(map(is_below, literals)) for literals in statement.refuted)


def agree(function, points=POINTS):
    statement = statement_of(function, X)
    expected = np.asarray(jax.vmap(lambda x: jnp.all(function(x)))(points))
    np.testing.assert_array_equal([holds(statement, x) for x in points], expected)
    return statement


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.sampled(3)
def test_random_combinations(seed):
    function = random_property(np.random.default_rng(seed), 3)
    try:
        statement_of(function, X)
    except ValueError as error:  # such as x ^ x
        assert "whatever the outputs" in str(error)  # noqa: PT017
        return
    agree(function, POINTS[:: 1 + seed % 3])


MOVES = {
    "array": lambda y: y > -0.9,
    "all": lambda y: jnp.all(y[:2] < y[2:]),
    "any": lambda y: jnp.any(y.reshape(2, 2) > 0.2, axis=0),
    "concatenated": lambda y: jnp.concatenate([y[:1] > 0, y[1:] <= 0])[::-1],
    "broadcast": lambda y: (y[0] > 0) | (y < 0.3),
    "transposed": lambda y: (y.reshape(2, 2) > 0).T | (y.reshape(2, 2) < 0.4),
    "taken": lambda y: (y > 0)[jnp.array([2, 0])],
    "masked": lambda y: (y < 0.4) | ~MASK,
    "jitted": lambda y: jax.jit(lambda y: jnp.logical_not(jnp.all(y > 0)))(y),
    "booleans compared": lambda y: (y[0] > 0) == (y[1] > 0),
    "a largest value": lambda y: jnp.max(y[1:]) <= y[0],
    "a branch by a comparison": lambda y: jnp.where(y[0] > 0, y[1], -y[2]) >= y[3],
    "a position": lambda y: jnp.argmax(y) != 2,
    "never equal": lambda y: y[0] != y[1],
}


@pytest.mark.parametrize("case", MOVES)
def test_booleans_are_moved_and_reduced(case):
    agree(MOVES[case])


@pytest.mark.parametrize("size", [1, 2000])
def test_constants_are_compared_as_they_are(size):
    """The difference of integers would wrap around."""
    most, less = jnp.full(size, 2**31 - 1, jnp.int32), jnp.full(size, -5, jnp.int32)
    three, five = jnp.full(size, 3, jnp.uint8), jnp.full(size, 5, jnp.uint8)

    def function(y):
        wrong = jnp.any((most < less) | ~(three < five))
        return (y[0] > 0) | wrong

    (literals,) = agree(function).refuted
    assert len(literals) == 1


def test_only_what_decides_is_compared():
    def function(y):
        unused = y[3] > y[2]
        return (y[0] > 0) & ((y[1] > 0) | jnp.logical_or(y[1] <= 0, unused))

    assert len(agree(lambda y: y[0] > y[1]).refuted) == 1
    assert statement_of(lambda y: y[:2] > 0, X).differences(jnp.ones(4)).shape == (2,)
    agree(function)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda y: y, TypeError, r"one boolean array, made of comparisons, got float32\[4\]"),
        (lambda y: (y[0] > 0, y[1] > 0), TypeError, "one boolean array"),
        (lambda y: jnp.isfinite(y), ValueError, "got a boolean of 'is_finite'"),
        (lambda y: jnp.bool_(True), ValueError, "is true whatever the outputs are"),
        (lambda y: jnp.zeros(2, bool), ValueError, "is false whatever the outputs are"),
        (
            lambda y: jax.lax.fori_loop(0, 200, lambda i, b: b & (y[0] > i), True),
            ValueError,
            "outside of loops and branches; got a boolean of '(while|scan)'",
        ),
    ],
)
def test_what_is_no_statement(function, error, message):
    with pytest.raises(error, match=message) as caught:
        statement_of(function, X)
    assert "\n" not in str(caught.value)


def test_too_many_ways(monkeypatch):
    monkeypatch.setattr(statements, "MAX_DISJUNCTS", 30)

    def five_pairs(y):
        both = (y[0] > 0) & (y[1] > 0)
        return both | both | both | both | both

    with pytest.raises(ValueError, match=r"at most 30 ways.*got 32; prove it in parts"):
        statement_of(five_pairs, X)


def network(x):
    hidden = jax.nn.relu(x @ jnp.float32([[1.0, -1.0], [0.5, 1.0]]))
    return jnp.stack([hidden[0] - hidden[1], hidden[0] + hidden[1], hidden[0] * hidden[1]])


BOX = bj.Box(-jnp.ones(2), jnp.ones(2))
VERDICTS = {
    "one": (lambda y: y[1] > -0.1, "unsat"),
    "an array": (lambda y: y < 1.0, "sat"),
    "or": (lambda y: (y[0] > -0.1) | (y[1] > 0.05), "unsat"),
    "implication": (lambda y: ~(y[1] <= 0.05) | (jnp.abs(y[0]) <= 0.06), "unsat"),
    "with the input": (lambda y, x: y[1] >= x[0] + 0.5 * x[1] - 0.01, "unsat"),
    "with the input, broken": (lambda y, x: y[1] >= x[0] + 0.5 * x[1] + 0.01, "sat"),
    "a product": (lambda y: y[2] + 0.01 >= 0.0, "unsat"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts(case):
    function, verdict = VERDICTS[case]
    result = bj.prove(network, BOX, function, timeout=60.0)
    assert result.verdict == verdict
    if verdict == "sat":
        x, y = result.counterexample.inputs, result.counterexample.outputs
        assert x.shape == (2,)
        np.testing.assert_allclose(y, network(x), rtol=1e-6)
        arguments = (y, x) if "input" in case else (y,)
        assert not np.all(function(*arguments))


def test_several_outputs_and_two_networks():
    def both(x):
        return {"first": network(x), "second": network(1.001 * x)}

    def near(y):
        return jnp.abs(y["first"][:2] - y["second"][:2]) < 0.01

    assert bj.prove(both, BOX, near, timeout=60.0).proved
    result = bj.prove(both, BOX, lambda y: y["first"][1] >= y["second"][1], timeout=60.0)
    assert result.verdict == "sat"
    outputs = result.counterexample.outputs
    assert outputs["first"][1] < outputs["second"][1]


def test_a_tree_of_inputs_with_constraints():
    """A monotone function: where x <= z, also f(x) <= f(z)."""
    rising = bj.Constrained(BOX, jnp.float32([[1.0, -1.0]]), 0.0)

    def pair(v):
        return [jax.nn.relu(2.0 * part) for part in v]

    assert bj.prove(pair, rising, lambda y: y[0] <= y[1] + 0.01, timeout=60.0).proved
    result = bj.prove(pair, rising, lambda y: y[0] < y[1] - 0.01, timeout=60.0)
    x = result.counterexample.inputs
    assert x[0] <= x[1]
    result = bj.prove(
        lambda v: jnp.sum(v["a"]) - v["b"],
        {"a": BOX, "b": jnp.float32(0.5)},
        lambda y, v: (y <= 1.6) & (v["a"][0] <= 2.0),
        timeout=60.0,
    )
    assert result.proved


@pytest.mark.parametrize(
    ("property", "options", "error", "message"),
    [
        ("y > 0", {}, TypeError, "a function of the outputs, such as lambda y: .* got str"),
        (lambda a, b, c: a > b, {}, TypeError, "got a function of 3 arguments"),
        (lambda y: y > 0, {"with_proof": True}, ValueError, "needs an OutputProperty"),
        (lambda y: y, {}, TypeError, "one boolean array"),
    ],
)
def test_bad_properties(property, options, error, message):
    with pytest.raises(error, match=message):
        bj.prove(network, BOX, property, **options)
