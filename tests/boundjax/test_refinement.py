"""Refined intervals of operands beside grids, and searches that use them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinked import KINKED

import boundjax as bj
from boundjax import properties
from boundjax.search import Programs, refinement, tree
from boundjax.search.bounder import Root

pytestmark = pytest.mark.sampled(4)

SQUARE = bj.Box(-jnp.ones(2), jnp.ones(2))
GRID = jnp.stack(jnp.meshgrid(*2 * [jnp.linspace(-1.0, 1.0, 201)]), axis=-1).reshape(-1, 2)
NIGHTLY = ("leaky relu", "hinge", "min", "relu6", "hard tanh", "clamp", "clip")
EACH = [pytest.param(n, marks=pytest.mark.slow if n in NIGHTLY else []) for n in KINKED]


def layers(name, seed=0):
    """A network of two hidden layers, and the operand of the second one's op with kinks."""
    random = np.random.default_rng(seed)
    first, second, third = (
        jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 5), (5, 5), (5, 2))
    )
    act = KINKED[name]

    def summed(x):
        return act(x @ first) @ second

    def operand(x):
        value = summed(x)
        return {"relu6": 3.0 * value + 3.0, "hard tanh": 2.0 * value}.get(name, value)

    return lambda x: act(summed(x)) @ third, operand


def refined(programs, box=SQUARE, domains=4000, max_bytes=2**28):
    """The intervals before and after, by label, and the label of the last operand."""
    parts = programs.domains
    root = parts.root(*box.interval(), jnp.eye(programs.output_size), parts.unknown)
    kept = Root(
        root.intervals,
        np.asarray(root.positions),
        np.flatnonzero(root.active),
        np.flatnonzero(root.unstable),
    )
    options = {"domains": domains, "max_bytes": max_bytes, "check_time": lambda: None}
    return root.intervals, refinement.refined(parts, box, kept, **options), parts.refinable[-1]


@pytest.mark.parametrize("name", EACH)
def test_intervals_hold_and_come_near_to_the_range(name):
    function, operand = layers(name)
    before, after, label = refined(Programs(function, (2,), rounding="float32"))
    values = np.asarray(jax.jit(jax.vmap(operand))(GRID))
    least, most = values.min(axis=0), values.max(axis=0)
    lower, upper = np.asarray(after[label])
    assert (lower <= least).all()
    assert (most <= upper).all()
    loose = np.asarray(before[label].width)
    assert (upper - lower <= loose).all()
    assert (upper - lower).sum() < 0.9 * loose.sum()


@pytest.mark.parametrize("rounding", ["nearest", "real"])
def test_a_point_and_a_narrow_box_keep_their_values(rounding):
    function, operand = layers("relu")
    programs = Programs(function, (2,), rounding=rounding)
    for radius in (0.0, 1e-6):
        center = jnp.asarray([0.3, -0.2])
        box = bj.Box(center - radius, center + radius)
        _, after, label = refined(programs, box)
        value, room = np.asarray(operand(center)), 1e-6 if rounding == "nearest" else 0.0
        lower, upper = np.asarray(after[label])
        assert (lower <= value + room).all()
        assert (value - room <= upper).all()


@pytest.mark.parametrize("limit", [{"domains": 0}, {"domains": 1}, {"max_bytes": 1}])
def test_without_room_for_a_domain_nothing_changes(limit):
    before, after, label = refined(Programs(layers("relu")[0], (2,), rounding="real"), **limit)
    for end, same in zip(before[label], after[label], strict=True):
        np.testing.assert_array_equal(end, same)


def test_of_many_elements_those_with_the_widest_intervals_are_bounded(monkeypatch):
    programs, bounded_elements = Programs(layers("abs")[0], (2,), rounding="nearest"), []
    bounded = refinement._Operand._bounded

    def recorded(operand, elements, *arguments):
        bounded_elements.append(sorted(elements.tolist()))
        return bounded(operand, elements, *arguments)

    monkeypatch.setattr(refinement._Operand, "_bounded", recorded)
    before, _, label = refined(programs, domains=4)
    lower, upper = np.asarray(before[label])
    # Only the sign matters of operands whose kinks lie at 0.
    widest = np.argsort(np.minimum(-lower, upper))[-2:]
    assert bounded_elements == [sorted(widest.tolist())]


@pytest.mark.parametrize("name", ["relu", "abs", "relu and tanh"])
def test_searches_that_refine_at_once_answer_as_the_grid_does(name, monkeypatch):
    monkeypatch.setattr(tree, "_BEFORE_REFINING", 1)
    monkeypatch.setattr(tree, "_BETWEEN_REFININGS", 2)
    calls = []

    def counted(*arguments, **options):
        calls.append(options["domains"])
        return refinement_of(*arguments, **options)

    refinement_of = refinement.refined
    monkeypatch.setattr(refinement, "refined", counted)
    function, _ = layers(name, seed=1)
    programs = Programs(function, (2,), rounding="float32")
    least = np.asarray(jax.jit(jax.vmap(function))(GRID))[:, 0].min()
    # What is smooth has nothing to split: its bounds stay loose.
    above = 0.2 if name == "relu and tanh" else 0.05
    for threshold, verdict in ((above, "unsat"), (-1e-3, "sat")):
        result = bj.prove(
            function,
            SQUARE,
            properties.all_positive(np.eye(2)[:1], np.asarray([threshold - least])),
            programs=programs,
            max_split_inputs=0,
            timeout=300.0,
        )
        assert result.verdict == verdict, result.note
    assert calls
    assert calls == sorted(calls)


@pytest.mark.slow
def test_a_search_for_a_proof_does_not_refine(monkeypatch):
    monkeypatch.setattr(tree, "_BEFORE_REFINING", 1)
    monkeypatch.setattr(refinement, "refined", None)
    function, _ = layers("relu", seed=1)
    least = np.asarray(jax.vmap(function)(GRID))[:, 0].min()
    result = bj.prove(
        function,
        SQUARE,
        properties.all_positive(np.eye(2)[:1], np.asarray([0.05 - least])),
        timeout=300.0,
        max_split_inputs=0,
        with_proof=True,
    )
    assert result.verdict == "unsat"
    assert result.proof is not None
