"""Inputs that are pytrees: trees of sets and sets of trees, against the flattened function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj

pytestmark = pytest.mark.sampled(3)

RNG = np.random.default_rng(5)
STATE = RNG.normal(size=(2, 3)).astype(np.float32)
ACTION = RNG.normal(size=4).astype(np.float32)
MASK = np.array([1, 0, 1, 1], np.int32)
WEIGHTS = [RNG.normal(size=shape).astype(np.float32) for shape in ((6, 5), (4, 5), (5, 2))]
EPS = 0.2


def network(state, action, mask=MASK):
    """Two inputs, a masked one and one that is used twice."""
    masked = jnp.where(mask == 1, action, 0.0)
    hidden = jax.nn.relu(state.reshape(-1) @ WEIGHTS[0] + masked @ WEIGHTS[1])
    return hidden @ WEIGHTS[2] + action[:2]


def of_dict(tree):
    return network(tree["state"], tree["action"], tree.get("mask", MASK))


def of_nested(tree):
    first, (second,) = tree
    return network(first["state"], second)


def of_flat(flat):  # in the order of the dictionary's keys
    return network(flat[4:].reshape(2, 3), flat[:4])


def of_flat_nested(flat):
    return network(flat[:6].reshape(2, 3), flat[6:])


def box(x, eps=EPS):
    return bj.Box(x - np.float32(eps), x + np.float32(eps))


FLAT = np.concatenate([ACTION, STATE.reshape(-1)])
TREE = {"state": STATE, "action": ACTION}
LOWER, UPPER = (jax.tree.map(lambda x, s=s: x + np.float32(s * EPS), TREE) for s in (-1, 1))


def _ball(p, clip=None):
    return bj.LpBall(TREE, EPS, p, clip), bj.LpBall(FLAT, EPS, p, clip)


# The tree, the set of the flat array, and their functions.
FORMS = {
    "tree of boxes": ({"state": box(STATE), "action": box(ACTION)}, box(FLAT), of_dict, of_flat),
    "box of trees": (bj.Box(LOWER, UPPER), box(FLAT), of_dict, of_flat),
    "tree of a ball and a box": (
        {"state": bj.LpBall(STATE, EPS), "action": box(ACTION), "mask": MASK},
        box(FLAT),
        of_dict,
        of_flat,
    ),
    "nested": (
        (bj.Box({"state": STATE - EPS}, {"state": STATE + EPS}), [box(ACTION)]),
        box(np.concatenate([STATE.reshape(-1), ACTION])),
        of_nested,
        of_flat_nested,
    ),
    "l1 ball of trees": (*_ball(1), of_dict, of_flat),
    "l2 ball of trees": (*_ball(2), of_dict, of_flat),
    "l3 ball of trees": (*_ball(3), of_dict, of_flat),
    "linf ball of trees": (*_ball(jnp.inf), of_dict, of_flat),
    "clipped l2 ball of trees": (*_ball(2, (-1.5, 1.5)), of_dict, of_flat),
    "ball of trees with radii": (
        bj.LpBall(TREE, {"state": EPS, "action": np.linspace(0, 0.3, 4, dtype=np.float32)}, 2),
        bj.LpBall(FLAT, np.concatenate([np.linspace(0, 0.3, 4), np.full(6, EPS)]), 2),
        of_dict,
        of_flat,
    ),
    "ball and box of trees": (
        bj.BallBox(TREE, EPS, LOWER, jax.tree.map(lambda x: x + 0.1, TREE)),
        bj.BallBox(FLAT, EPS, FLAT - np.float32(EPS), FLAT + 0.1),
        of_dict,
        of_flat,
    ),
}
TRANSFORMS = {
    "interval": bj.interval,
    "crown-ibp": bj.linear,
    "crown": functools.partial(bj.linear, intermediate="linear"),
    "forward": bj.forward_linear,
    "bcp": bj.lipschitz,
    "lmt": functools.partial(bj.lipschitz, box=False),
}


CASES = [(form, transform, "nearest") for form in FORMS for transform in TRANSFORMS]
# Rounded bounds take long to compile.
RIGOROUS = [(form, transform, r) for form, transform, _ in CASES for r in ("real", "float32")]
BY_DAY = [
    ("tree of a ball and a box", "interval", "float32"),
    ("tree of boxes", "crown-ibp", "real"),
]
ROWS = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)


def points_of(flat, count=100):
    """Points of a set: the furthest ones in random directions."""
    shape = flat.interval().lower.shape
    directions = jnp.asarray(RNG.normal(size=(count, *shape)), jnp.float32)
    return jax.jit(jax.vmap(jax.grad(flat.support)))(directions)


def assert_close(tree, flat, share=1e-6):
    size = max(float(jnp.abs(end).max()) for end in jax.tree.leaves(flat))
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(flat), strict=True):
        np.testing.assert_allclose(one, other, atol=share * size, rtol=0)


@pytest.mark.sampled(16)
@pytest.mark.parametrize(("form", "transform", "rounding"), CASES)
def test_a_tree_and_its_flat_array_have_the_same_bounds(form, transform, rounding):
    assert_equal_to_flat(form, transform, rounding)


@pytest.mark.parametrize(("form", "transform", "rounding"), BY_DAY)
def test_so_they_do_with_rounding(form, transform, rounding):
    assert_equal_to_flat(form, transform, rounding)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "transform", "rounding"), RIGOROUS)
def test_so_they_do_with_every_rounding(form, transform, rounding):
    assert_equal_to_flat(form, transform, rounding)


def assert_equal_to_flat(form, transform, rounding):
    tree, flat, of_tree, of_array = FORMS[form]
    make = functools.partial(TRANSFORMS[transform], rounding=rounding)
    both = jax.jit(lambda tree, flat: (make(of_tree)(tree, ROWS), make(of_array)(flat, ROWS)))
    bounds, of_flat_set = both(tree, flat)
    assert_close(bounds, of_flat_set)
    values = jax.jit(jax.vmap(of_array))(points_of(flat)) @ ROWS.T
    slack = 1e-5 if rounding == "nearest" else 0.0
    if rounding == "real":
        slack = 1e-6 * float(jnp.abs(values).max())  # of the values
    assert (bounds.lower <= values.min(0) + slack).all()
    assert (values.max(0) - slack <= bounds.upper).all()


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
def test_the_methods_of_a_set_of_trees_answer_in_its_structure(form):
    tree, flat, *_ = FORMS[form]
    if not isinstance(tree, bj.InputSet):
        return
    ends = tree.interval()
    assert {jax.tree.structure(end) for end in ends} == {jax.tree.structure(TREE)}
    flat_ends = flat.interval()
    for end, expected in zip(ends, flat_ends, strict=True):
        assert_close(jnp.concatenate([end["action"], end["state"].reshape(-1)]), expected)
    rows = jax.tree.map(lambda x: jnp.asarray(x - 0.3), TREE)
    flat_rows = jnp.concatenate([rows["action"], rows["state"].reshape(-1)])
    for method in ("support", "spread"):
        value, expected = (getattr(s, method)(r) for s, r in ((tree, rows), (flat, flat_rows)))
        assert value == pytest.approx(float(expected), rel=1e-6)
    assert (tree.ball()[0]["state"].reshape(-1) == flat.ball()[0][4:]).all()
    assert tree.ball()[1] == pytest.approx(float(flat.ball()[1]), rel=1e-6)
    assert tree.outwards().outward
    assert tree.is_box == flat.is_box


@pytest.mark.quick
def test_auxiliary_results_have_the_structure_of_the_input():
    tree = {"state": bj.LpBall(STATE, EPS, 2), "action": box(ACTION), "mask": MASK}
    _, aux = jax.jit(bj.linear(of_dict, has_aux=True))(tree, ROWS)
    shapes = {"state": (3, 2, 3), "action": (3, 4), "mask": (3, 4)}
    assert jax.tree.map(jnp.shape, aux.worst_input) == shapes
    assert (np.asarray(aux.worst_input["mask"]) == MASK).all()
    lower, bias, upper, _ = aux.coefficients
    assert jax.tree.map(jnp.shape, lower) == jax.tree.map(jnp.shape, upper) == shapes
    assert not lower["mask"].any()
    values = jnp.einsum("ri,ri->r", ROWS, jax.vmap(of_dict)(aux.worst_input))
    attained = bias
    for name in ("state", "action"):
        axes = tuple(range(1, lower[name].ndim))
        attained += jnp.sum(lower[name] * aux.worst_input[name], axis=axes)
    np.testing.assert_allclose(attained, aux.linear.lower, atol=1e-4)
    assert (attained <= values + 1e-4).all()

    forward = jax.jit(bj.forward_linear(of_dict, has_aux=True))(tree, ROWS)[1]
    assert jax.tree.map(jnp.shape, forward.upper_coefficients) == shapes
    estimate = bj.estimate(of_dict, jax.random.key(0), has_aux=True)
    boxes = {"state": box(STATE), "action": box(ACTION)}
    assert jax.tree.map(jnp.shape, jax.jit(estimate)(boxes, ROWS)[1].worst_input) == {
        "state": (3, 2, 3),
        "action": (3, 4),
    }


@pytest.mark.quick
def test_a_ball_in_a_tree_bounds_first_layers_as_it_does_alone():
    alone = bj.LpBall(ACTION, 0.1, 2)
    tree = {"action": alone, "state": bj.LpBall(STATE, 3.0, 2)}
    for rounding in ("nearest", "real"):
        bounds = jax.jit(bj.interval(lambda a: a["action"] @ WEIGHTS[1], rounding=rounding))(tree)
        expected = jax.jit(bj.interval(lambda a: a @ WEIGHTS[1], rounding=rounding))(alone)
        assert_close(bounds, expected, 1e-5)
    ball = bj.lipschitz(lambda a: a["action"] @ WEIGHTS[1], box=False)(tree)
    assert ball.radius == bj.lipschitz(lambda a: a @ WEIGHTS[1], box=False)(alone).radius


@pytest.mark.quick
def test_points_are_bounded_exactly():
    tree = {"state": bj.Box(STATE, STATE), "action": bj.LpBall(ACTION, 0.0, 2), "mask": MASK}
    exact = of_dict({"state": STATE, "action": ACTION, "mask": MASK})
    for transform in (bj.interval, bj.linear, bj.forward_linear):
        assert_close(jax.jit(transform(of_dict))(tree), (exact, exact))


@pytest.mark.quick
def test_one_set_in_a_tree_keeps_its_shape():
    seen = []

    def function(tree):
        seen.append(jax.make_jaxpr(lambda x: x)(tree["x"]).in_avals[0].shape)
        return jnp.sum(tree["x"])

    aux = bj.linear(function, has_aux=True)({"x": box(STATE)})[1]
    assert seen[0] == (2, 3)
    assert aux.coefficients.lower_coefficients["x"].shape == (1, 2, 3)
    graph_size = len(bj.interval(lambda a: jax.nn.relu(a["x"]), has_aux=True)({"x": box(STATE)})[1])
    assert graph_size == 1


@pytest.mark.slow
def test_batches_gradients_and_weights_as_sets():
    centers = jnp.asarray(RNG.normal(size=(3, *ACTION.shape)), jnp.float32)
    bounded = bj.linear(of_dict)

    def of_one(center, eps):
        return bounded({"state": bj.LpBall(STATE, eps, 2), "action": bj.LpBall(center, eps)})

    batch = jax.jit(jax.vmap(of_one, (0, None)))(centers, 0.1)
    for k in range(3):
        assert_close(jax.tree.map(lambda end, k=k: end[k], batch), jax.jit(of_one)(centers[k], 0.1))

    def widths(lower, upper):
        ends = bj.linear(lambda t: jax.nn.relu(t["w"] @ t["x"]))(
            {"w": bj.Box(lower, upper), "x": ACTION}
        )
        return jnp.sum(ends.upper - ends.lower)

    def flat_widths(lower, upper):
        ends = bj.linear(lambda w: jax.nn.relu(w @ ACTION))(bj.Box(lower, upper))
        return jnp.sum(ends.upper - ends.lower)

    weights = jnp.asarray(WEIGHTS[1].T)
    ends = weights - 0.1, weights + 0.1
    gradients = jax.grad(widths, (0, 1))(*ends)
    assert_close(gradients, jax.grad(flat_widths, (0, 1))(*ends))
    assert all(jnp.any(g != 0) for g in gradients)


@pytest.mark.quick
def test_float64_and_mixed_dtypes():
    with jax.enable_x64(True):
        wide = {"a": bj.Box(jnp.zeros(2), jnp.ones(2)), "b": bj.LpBall(jnp.zeros(3), 0.5)}
        bounds = bj.linear(lambda t: jnp.sum(t["a"]) + t["b"])(wide)
        assert bounds.lower.dtype == jnp.float64
        np.testing.assert_allclose(bounds.lower, -0.5, atol=1e-12)
        np.testing.assert_allclose(bounds.upper, 2.5, atol=1e-12)
        mixed = {**wide, "b": bj.LpBall(jnp.zeros(3, jnp.float32), 0.5)}
        with pytest.raises(TypeError, match="one floating dtype, got float32 and float64"):
            bj.linear(lambda t: t["b"])(mixed)


@pytest.mark.quick
def test_two_inputs_have_their_exact_ends():
    weights = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    zeros = {"s": jnp.zeros(2), "u": jnp.zeros(3)}
    ones = jax.tree.map(lambda x: x + 1, zeros)
    bounds = bj.linear(lambda a: a["s"] @ weights + a["u"])(bj.Box(zeros, ones))
    np.testing.assert_allclose(bounds.lower, np.minimum(weights, 0).sum(0), atol=1e-6)
    np.testing.assert_allclose(bounds.upper, np.maximum(weights, 0).sum(0) + 1, atol=1e-6)


@pytest.mark.quick
def test_a_function_that_expects_another_tree_says_what_it_was_given():
    with pytest.raises(ValueError, match=r"looked for 'action' .*\{'state': float32\[2,3\]\}") as e:
        bj.linear(of_dict)({"state": box(STATE)})
    assert "\n" not in str(e.value)
    with pytest.raises(TypeError) as error:
        bj.linear(of_dict)((box(STATE), box(ACTION)))
    assert any("(float32[2,3], float32[4])" in note for note in error.value.__notes__)


@pytest.mark.quick
def test_lists_of_numbers_are_arrays_also_under_jit():
    numbers = bj.Box([0.0, 1.0], [1.0, 2.0])
    for bounds in (bj.linear(jnp.negative), jax.jit(bj.linear(jnp.negative))):
        assert bounds(numbers).lower.tolist() == [-1.0, -2.0]


@pytest.mark.quick
def test_outward_numbers_of_a_tree_are_rounded_outwards():
    center, point = {"a": np.float32([1000.0])}, {"a": np.array([0.1])}
    ball = bj.LpBall(center, {"a": 2e-5}, outward=True)
    lower, upper = ball.interval()
    assert lower["a"] < 1000.0 < upper["a"]
    ends = bj.Box(point, point, outward=True).interval()
    assert np.float64(ends.lower["a"][0]) < 0.1 < np.float64(ends.upper["a"][0])


def test_properties_of_functions_of_trees_are_proved_or_refuted():
    tree = {"state": bj.Box(STATE - 0.01, STATE + 0.01), "action": bj.LpBall(ACTION, 0.01)}
    tree["mask"] = MASK
    middle = of_dict({"state": STATE, "action": ACTION, "mask": MASK})
    rows = np.float64([[1.0, 0.0]])
    proved = bj.prove(of_dict, tree, bj.properties.all_positive(rows, 1.0 - float(middle[0])))
    assert proved.proved
    refuted = bj.prove(of_dict, tree, bj.properties.all_positive(rows, -float(middle[0])))
    point = refuted.counterexample
    assert {k: np.shape(v) for k, v in point.inputs.items()} == {
        "state": (2, 3),
        "action": (4,),
        "mask": (4,),
    }
    assert of_dict(point.inputs)[0] == point.outputs[0] <= middle[0]
    for name, center in (("state", STATE), ("action", ACTION)):
        assert (np.abs(point.inputs[name].astype(float) - center) <= 0.01 + 1e-7).all()
    optimum = bj.milp_optimum(of_dict, tree, rows[0])
    assert optimum.status == "optimal"
    assert optimum.upper == pytest.approx(optimum.lower, abs=1e-4)
    assert optimum.input["state"].shape == (2, 3)


@pytest.mark.quick
def test_what_a_search_refuses_of_trees():
    ball = {"a": bj.LpBall(ACTION, 0.1, 2), "b": box(STATE)}
    property = bj.properties.all_positive(np.eye(4))
    with pytest.raises(ValueError, match=r"needs a box.*LpBall with p = 2"):
        bj.prove(lambda t: t["a"], ball, property)
    with pytest.raises(ValueError, match="programs serve a function of one array"):
        bj.prove(lambda t: t["a"], {"a": box(ACTION)}, property, programs=object())


@pytest.mark.quick
def test_norms_of_layers_take_the_sets_of_a_tree():
    tree = {"state": box(STATE), "action": box(ACTION)}
    norms = bj.spectral_norms(of_dict, tree)
    assert sorted(map(float, norms.values())) == pytest.approx(
        sorted(np.linalg.norm(w, 2) for w in WEIGHTS), rel=1e-2
    )
    bounds = jax.jit(bj.lipschitz(of_dict, norms=norms))(tree)
    assert_close(bounds, jax.jit(bj.lipschitz(of_dict))(tree))
    with pytest.raises(TypeError, match="expected an input set in the pytree"):
        bj.spectral_norms(of_dict, {"state": STATE, "action": ACTION})
