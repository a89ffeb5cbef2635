"""Defines what to time: nets, methods, and one function that bounds all margins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

import boundjax as bj
from boundjax.sets.rounding import Rounding
from boundjax.training import robust_cross_entropy
from experiments import models
from experiments.benchmarks import timing
from experiments.benchmarks.process import Case, Prepared
from experiments.methods.method import apply


class Net(NamedTuple):
    """Benchmark inputs of a net: shape and number of images, and the methods to time."""

    image_shape: tuple[int, int, int]
    examples: int
    methods: tuple[str, ...]


# alpha-CROWN, with the rate and decay of `boundjax.certify`.
STEPS = 20
_ADAM = optax.adam(optax.exponential_decay(0.5, transition_steps=1, decay_rate=0.9))
_ALPHA = partial(bj.optimized, STEPS, _ADAM, per_spec=True)
_LINEAR = partial(bj.linear, sides="lower", intermediate="linear")
METHODS: dict[str, Callable[..., Callable[..., Any]]] = {
    "interval": bj.interval,
    "random": partial(bj.linear, sides="lower", slopes=bj.slopes.uniform(jax.random.key(0))),
    "parallel": partial(bj.linear, sides="lower", slopes="parallel"),
    "crown-ibp": partial(bj.linear, sides="lower"),
    "one-step": partial(
        bj.linear,
        sides="lower",
        slopes=bj.optimized(objective=robust_cross_entropy, start="adaptive"),
    ),
    "20 steps": partial(bj.linear, sides="lower", slopes=_ALPHA()),
    "fast-lin": partial(_LINEAR, slopes="parallel", intersect=False),
    "crown": _LINEAR,
    "crown, 20 steps": partial(_LINEAR, slopes=_ALPHA()),
    "alpha-crown": partial(_LINEAR, slopes=_ALPHA(optimize_intermediate=True), max_bytes=2**26),
}
# One example at a time, as in `boundjax.certify` on CPU: its unstable rows are then known exactly.
_ONE_BY_ONE = ("fast-lin", "crown", "crown, 20 steps", "alpha-crown")
_BY_INTERVALS = ("interval", "random", "parallel", "crown-ibp", "one-step", "20 steps")
NETS = {
    "mlp_2x100": Net((28, 28, 1), 16, tuple(METHODS)),
    "small_star": Net((28, 28, 1), 16, tuple(METHODS)),
    # Linear bounds on its 229,888 units take minutes; `--methods` enables them.
    "cnn7": Net((32, 32, 3), 2, _BY_INTERVALS),
}


class Bounded(NamedTuple):
    """A network and the images `[B, H, W, C]` around which to bound it."""

    apply: Callable[..., jax.Array]
    variables: Any
    images: jax.Array


def untrained(name: str) -> Bounded:
    """Creates a net of the table with random weights and images."""
    net, model = NETS[name], models.create(name)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(net.examples, *net.image_shape)).astype(np.float32)
    variables = model.init(jax.random.key(0), jnp.asarray(images[:1]))
    return Bounded(partial(apply, model), variables, jnp.asarray(images))


def specifications(net: Bounded) -> tuple[jax.Array, jax.Array]:
    """Returns the logits `[B, 10]` of the images and the rows `[B, 9, 10]` of their margins."""
    logits = net.apply(net.variables, net.images)
    return logits, bj.margin_specification(jnp.argmax(logits, axis=-1), 10)


def bound(
    apply: Callable[..., jax.Array],
    method: str,
    eps: float,
    variables: Any,
    images: jax.Array,
    rows: jax.Array,
    rounding: Rounding = "nearest",
) -> bj.Interval:
    """Bounds a specification on the clipped l-infinity balls around the images: `[B, m]`."""
    transform = partial(METHODS[method], rounding=rounding)(lambda x: apply(variables, x[None])[0])
    ball = partial(bj.LpBall, eps=eps, clip=(0.0, 1.0))
    if method in _ONE_BY_ONE and jax.default_backend() == "cpu":
        return jax.lax.map(lambda pair: transform(ball(pair[0]), pair[1]), (images, rows))
    return jax.vmap(lambda x, rows: transform(ball(x), rows))(images, rows)


def case(name: str, eps: float) -> Case:
    """Exports an untrained net of the table as arrays, for another process or library."""
    net, model = untrained(name), models.create(name)
    logits, rows = specifications(net)
    variables = traverse_util.flatten_dict(net.variables, sep="/")
    return Case(
        net=name,
        eps=eps,
        steps=STEPS,
        architecture={
            "convolutions": [tuple(layer) for layer in model.convolutions],
            "hidden": model.hidden,
            "classes": model.num_classes,
            "batch_norm": model.batch_norm,
        },
        images=np.asarray(net.images),
        rows=np.asarray(rows),
        logits=np.asarray(logits),
        variables={path: np.asarray(value) for path, value in variables.items()},
    )


def prepare(case: Case, method: str) -> Prepared:
    """Compiles our side of a comparison for a case: a method of `METHODS`, or `forward`."""
    model = models.create(case.net)
    variables = traverse_util.unflatten_dict(case.variables, sep="/")

    def lower(variables: Any, images: jax.Array, rows: jax.Array) -> jax.Array:
        if method == "forward":
            return jnp.einsum("bmc,bc->bm", rows, apply(model, variables, images))
        return bound(partial(apply, model), method, case.eps, variables, images, rows).lower

    arguments = jax.tree.map(jnp.asarray, (variables, case.images, case.rows))
    compiled = timing.compiled(method, lower, *arguments)
    return Prepared(
        lambda: np.asarray(compiled.run()), compiled.compile_seconds, f"jax {jax.__version__}"
    )
