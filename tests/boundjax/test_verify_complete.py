"""`method="complete"`: splits of piecewise linear ops, against exact optima and known answers."""

import contextlib
import itertools
import time

import jax
import numpy as np
import pytest
from jax import nn
from jax import numpy as jnp
from kinked import KINKED
from properties import box, hat

import boundjax as bj
from boundjax import verify
from boundjax.search import leaves, tree
from boundjax.search.network import FlatNetwork
from boundjax.search.programs import Programs

NEAR = 1e-4  # distance of thresholds from an exact optimum


def decide(function, property, **options):
    """The verdict with splits of ops alone: no box is halved."""
    options = {"method": "complete", "timeout": 60.0, "max_split_inputs": 0} | options
    return verify.verify(function, property, **options)


def layers_of(seed, sizes):
    random = np.random.default_rng(seed)
    return [
        (random.normal(size=shape) / shape[0] ** 0.5, 0.3 * random.normal(size=shape[1]))
        for shape in itertools.pairwise(sizes)
    ]


def least_of(function, row):
    """The exact minimum of a row over `[-1, 1]^4`."""
    optimum = bj.milp_optimum(function, bj.Box(-jnp.ones(4), jnp.ones(4)), row)
    assert optimum.status == "optimal"
    return optimum.lower


def dense(layers):
    layers = [tuple(map(jnp.float32, layer)) for layer in layers]

    def function(x):
        for kernel, bias in layers[:-1]:
            x = nn.relu(x @ kernel + bias)
        return x @ layers[-1][0] + layers[-1][1]

    return function


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_thresholds_beside_the_exact_optimum(seed):
    """What a MILP says is reached just so is `sat`, and what is just not reached is `unsat`."""
    layers = layers_of(seed, (4, 8, 8, 2))
    function = dense(layers)
    programs = Programs(function, (4,))
    for output in range(2):
        row = np.eye(2)[output]
        least = least_of(function, row)
        for threshold, verdict in ((least - NEAR, "unsat"), (least + NEAR, "sat")):
            property = box([(-1, 1)] * 4, 2, f"(<= Y_{output} {threshold:.7f})")
            assert decide(function, property, programs=programs).verdict == verdict
    # CROWN alone decides none of the unsat ones.
    property = box([(-1, 1)] * 4, 2, f"(<= Y_1 {least - NEAR:.7f})")
    loose = decide(function, property, programs=programs, method="crown")
    assert loose.verdict == "unknown"


NIGHTLY = ("hinge", "leaky relu", "abs", "max", "min", "relu6", "hard tanh", "clamp")
NAMES = ["clip", *(pytest.param(n, marks=pytest.mark.slow) for n in NIGHTLY)]


@pytest.mark.parametrize("name", NAMES)
def test_every_op_with_kinks_is_split(name):
    random = np.random.default_rng(3)
    first, second = random.normal(size=(2, 5)), random.normal(size=(5, 1))
    first, second = (jnp.asarray(array, jnp.float32) for array in (first, second))
    kinked = KINKED[name]

    def function(x):
        return kinked(x @ first) @ second

    # The least value of a piecewise linear function of two inputs is where two kinks, or edges,
    # meet; a grid comes near.
    grid = jnp.linspace(-1.0, 1.0, 301)
    points = jnp.stack(jnp.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    least = float(np.min(jax.jit(jax.vmap(function))(points)))
    programs = Programs(function, (2,))
    for threshold, verdict in ((least - 0.05, "unsat"), (least + 0.01, "sat")):
        property = box([(-1, 1)] * 2, 1, f"(<= Y_0 {threshold:.7f})")
        assert decide(function, property, programs=programs).verdict == verdict


def test_a_split_whose_multiplier_is_zero_still_counts():
    """The leaf `x <= 0` of `0.5 - relu(x)` is proved without its multiplier; 1 is unsafe."""
    function = lambda x: 0.5 - nn.relu(x)  # noqa: E731
    result = decide(function, box([(-1, 1)], 1, "(<= Y_0 0)"))
    assert result.verdict == "sat"
    assert result.counterexample.inputs[0] >= 0.5
    assert decide(function, box([(-1, 1)], 1, "(<= Y_0 -0.51)")).verdict == "unsat"


@pytest.fixture(scope="module")
def programs_of_hat():
    return Programs(hat, (2,))


@pytest.mark.parametrize(
    ("unsafe", "verdict"),
    [
        ("(>= Y_0 2.01)", "unsat"),
        ("(and (>= Y_0 1.9) (<= Y_1 -0.8))", "sat"),
        # No row alone is refuted on every domain, but a mean of both is.
        ("(and (>= Y_0 1.5) (<= Y_1 -1.1))", "unsat"),
        ("(and (<= Y_0 0.5) (>= Y_1 0.6))", "unsat"),
        pytest.param(
            "(or (>= Y_0 2.1) (and (<= Y_0 0.5) (>= Y_1 0.51)))", "unsat", marks=pytest.mark.slow
        ),
    ],
)
def test_conjunctions_of_several_rows(unsafe, verdict, programs_of_hat):
    result = decide(hat, box([(-1, 1)] * 2, 2, unsafe), programs=programs_of_hat)
    assert result.verdict == verdict


@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_a_network_that_is_not_finite_is_never_proved(bad):
    function = lambda x: jnp.sum(nn.relu(x), keepdims=True) + jnp.float32(bad)  # noqa: E731
    property = box([(-1, 1)] * 3, 1, "(<= Y_0 -9999)")
    result = decide(function, property)
    assert result.verdict == "unknown"
    assert "cannot be split further" in result.note


@pytest.mark.slow
def test_a_network_without_kinks_has_optimised_bounds(monkeypatch):
    monkeypatch.setattr(tree, "_LEAF_STEPS", 5)
    function = lambda x: jnp.tanh(x[:1]) - 0.5 * jnp.tanh(x[1:])  # noqa: E731
    programs = Programs(function, (2,))
    for threshold, verdict in ((-1.2, "unsat"), (-1.1, "sat")):
        property = box([(-1, 1)] * 2, 1, f"(<= Y_0 {threshold})")
        assert decide(function, property, programs=programs).verdict == verdict


@pytest.mark.slow
def test_what_cannot_be_split_is_unknown_and_says_so(monkeypatch):
    """Only the relu is split; the two sines stay as they are."""
    monkeypatch.setattr(tree, "_LEAF_STEPS", 5)

    def function(x):
        return jnp.sin(3.0 * x[:1]) - jnp.sin(3.0 * x[:1] + 0.1) + nn.relu(x[1:])

    result = decide(function, box([(-2, 2), (-1, 1)], 1, "(<= Y_0 -0.5)"))
    assert result.verdict == "unknown"
    assert "cannot be split further; their bounds lack up to" in result.note


def test_what_only_rounding_leaves_open_says_so():
    """The least value of `|x - 0.1| + 1` is 1, and float32 cannot tell 1 from a little less."""
    function = lambda x: jnp.abs(x - 0.1) + 1.0  # noqa: E731
    programs = Programs(function, (1,))
    near = decide(function, box([(-1, 1)], 1, "(<= Y_0 0.99999999)"), programs=programs)
    assert near.verdict == "unknown"
    assert "undecided within the rounding of bounds; their bounds lack up to" in near.note
    far = decide(function, box([(-1, 1)], 1, "(<= Y_0 0.999)"), programs=programs)
    assert far.verdict == "unsat"


@pytest.mark.quick
def test_a_linear_program_proposes_the_best_multipliers():
    rows = leaves.Affine(np.array([[1.0, 0.0], [0.0, -1.0]]), np.array([0.5, 0.0]))
    splits = leaves.Affine(np.array([[1.0, 1.0]]), np.array([1.0]))
    ends = np.full(2, -1.0), np.full(2, 1.0)
    solution = leaves.solve(rows, splits, *ends, most=10.0)
    assert solution.inside
    assert solution.mix.sum() == pytest.approx(1)
    # The bound with these numbers, over the box, is the optimum.
    sums = solution.mix @ rows.coefficients + solution.multipliers @ splits.coefficients
    bound = solution.mix @ rows.bias + solution.multipliers @ splits.bias - np.abs(sums).sum()
    assert bound == pytest.approx(solution.value)
    values = rows.coefficients @ solution.point + rows.bias
    assert values.max() == pytest.approx(solution.value)
    assert (splits.coefficients @ solution.point + splits.bias <= 1e-6).all()


@pytest.mark.quick
def test_an_empty_domain_is_refuted_by_its_multipliers():
    rows = leaves.Affine(np.array([[1.0]]), np.array([-5.0]))
    splits = leaves.Affine(np.array([[1.0], [-1.0]]), np.array([0.5, 0.5]))
    solution = leaves.solve(rows, splits, np.array([-1.0]), np.array([1.0]), most=100.0)
    assert not solution.inside
    sums = rows.coefficients[0] + solution.multipliers @ splits.coefficients
    assert rows.bias[0] + solution.multipliers @ splits.bias - np.abs(sums).sum() > 0
    assert solution.multipliers.sum() <= 100.0 + 1e-6


@pytest.mark.slow
def test_the_search_is_the_same_every_time(monkeypatch):
    layers = layers_of(7, (4, 8, 8, 2))
    function = dense(layers)
    least = least_of(dense(layers), np.eye(2)[0])
    property = box([(-1, 1)] * 4, 2, f"(<= Y_0 {least - NEAR:.7f})")
    programs, counts = Programs(function, (4,)), []
    refutes = tree.Tree.refutes

    def counted(self):
        answer = refutes(self)
        counts.append(self.domains)
        return answer

    monkeypatch.setattr(tree.Tree, "refutes", counted)
    for _ in range(2):
        assert decide(function, property, programs=programs).verdict == "unsat"
    assert counts[0] == counts[1] > 2


def test_time_ends_the_search():
    layers = layers_of(8, (20, 60, 60, 60, 2))
    least = 0.0
    property = box([(-3, 3)] * 20, 2, f"(<= Y_0 {least - 3.0:.7f})")
    result = decide(dense(layers), property, timeout=0.1)
    assert result.verdict == "timeout"


@pytest.mark.parametrize("counted", [True, False])
def test_the_time_of_compilation_may_not_count(counted, monkeypatch):
    stopped = FlatNetwork.stopped_clock

    @contextlib.contextmanager
    def slowly(self):
        with stopped(self):
            yield
            time.sleep(1.0)

    monkeypatch.setattr(FlatNetwork, "stopped_clock", slowly)
    property = box([(-1, 1)], 1, "(<= Y_0 -0.51)")
    options = {"timeout": 0.9, "count_compilation": counted}
    result = decide(lambda x: 0.5 - nn.relu(x), property, **options)
    assert result.verdict == ("timeout" if counted else "unsat")
