"""Inputs that are pytrees: trees of sets and sets of trees, against the flattened function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj

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


def _corners(form, count=200):
    """Points of a form's flat set: the furthest ones in random directions."""
    flat = FORMS[form][1]
    directions = jnp.asarray(RNG.normal(size=(count, 10)), jnp.float32)
    return jax.vmap(jax.grad(flat.support))(directions)


def assert_close(tree, flat):
    size = max(float(jnp.abs(end).max()) for end in jax.tree.leaves(flat))
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(flat), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * size, rtol=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rounding", ["nearest", "real", "float32"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("form", FORMS)
def test_a_tree_and_its_flat_array_have_the_same_bounds(form, transform, rounding):
    tree, flat, of_tree, of_array = FORMS[form]
    rows = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)
    make = functools.partial(TRANSFORMS[transform], rounding=rounding)
    bounds = make(of_tree)(tree, rows)
    flat_bounds = make(of_array)(flat, rows)
    scale = 1 if rounding == "nearest" else 3  # trees may charge one more rounding of the set
    assert_close(jax.tree.map(lambda end: end / scale, tuple(bounds)), tuple(flat_bounds / np.float32(scale)) if False else jax.tree.map(lambda end: end / scale, tuple(flat_bounds)))
    values = jax.vmap(of_array)(_corners(form)) @ rows.T
    slack = 1e-5
    assert (bounds.lower <= values.min(0) + slack).all()
    assert (values.max(0) - slack <= bounds.upper).all()
