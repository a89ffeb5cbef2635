"""Times the bounds of every method, as ratios to a forward pass in the same process.

    python -m experiments.benchmarks.bounds

Random images, 9 margins each, clipped l-infinity ball, untrained weights; nets: the MLP
784-100-100-10, Small* and CNN-7 (`experiments.models`). The mean margin says what a
method is worth; those with intermediate bounds by intervals come first, the loosest before all.
`--run FOLDER` takes the trained network of a run of `experiments.main` and its first test images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import boundjax as bj
from boundjax.training import robust_cross_entropy
from experiments import models, trained
from experiments.benchmarks import timing
from experiments.errors import ExperimentError


class Net(NamedTuple):
    """What is bounded: images of one shape, how many of them, and by which methods."""

    image_shape: tuple[int, int, int]
    examples: int
    methods: tuple[str, ...]


# alpha-CROWN; the rate and its decay are those of `boundjax.certify`.
_ADAM = optax.adam(optax.exponential_decay(0.5, transition_steps=1, decay_rate=0.9))
_ALPHA = partial(bj.optimized, 20, _ADAM, per_spec=True)
_LINEAR = partial(bj.linear, sides="lower", intermediate="linear")
METHODS: dict[str, Callable[[Callable[[jax.Array], jax.Array]], Callable[..., Any]]] = {
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
_BY_INTERVALS = ("interval", "random", "parallel", "crown-ibp", "one-step", "20 steps")
NETS = {
    "mlp_2x100": Net((28, 28, 1), 16, tuple(METHODS)),
    "small_star": Net((28, 28, 1), 16, tuple(METHODS)),
    # Linear intermediate bounds would need a row for each of its 279,552 units.
    "cnn7": Net((32, 32, 3), 2, _BY_INTERVALS),
}


class Bounded(NamedTuple):
    """A network and the images `[B, H, W, C]` around which it is bounded."""

    apply: Callable[..., jax.Array]
    variables: Any
    images: jax.Array


def untrained(name: str) -> Bounded:
    """A net of the table with random weights and images."""
    net, model = NETS[name], models.create(name)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(net.examples, *net.image_shape)).astype(np.float32)
    variables = model.init(jax.random.key(0), jnp.asarray(images[:1]))
    return Bounded(model.apply, variables, jnp.asarray(images))


def of_run(run: trained.Trained, examples: int) -> Bounded:
    """A trained network and its first test images."""
    return Bounded(run.model.apply, run.variables, jnp.asarray(run.test.images[:examples]))


def measure(
    net: Bounded, methods: tuple[str, ...], eps: float
) -> tuple[list[timing.Measured], dict[str, str]]:
    """The forward pass and every method on one net, compiled; and what the bounds are worth."""
    labels = jnp.argmax(net.apply(net.variables, net.images), axis=-1)
    specifications = bj.margin_specification(labels, 10)

    def bound(method: str, variables: Any, images: jax.Array, rows: jax.Array) -> bj.Interval:
        transform = METHODS[method](lambda x: net.apply(variables, x[None])[0])
        ball = partial(bj.LpBall, eps=eps, clip=(0.0, 1.0))
        return jax.vmap(lambda x, rows: transform(ball(x), rows))(images, rows)

    candidates = [timing.compiled("forward", net.apply, net.variables, net.images)]
    worth = {}
    for method in methods:
        candidate = timing.compiled(
            method, partial(bound, method), net.variables, net.images, specifications
        )
        bounds = candidate.run()
        worth[method] = f"mean margin {jnp.mean(bounds.lower):9.4f}"
        candidates.append(candidate)
    return candidates, worth


def main() -> None:
    """Reads the flags, prints one table per net."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["mlp_2x100", "small_star"])
    parser.add_argument("--run", type=Path, help="a run folder: bounds of its network instead")
    parser.add_argument(
        "--examples", type=int, default=16, help="test images with --run (default: 16)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that fit")
    timing.add_repeats(parser, 20)
    parser.add_argument("--eps", type=float, default=0.02, help="pixel radius (default: 0.02)")
    flags = parser.parse_args()
    if not flags.eps >= 0:
        parser.error(f"--eps must be >= 0, got {flags.eps}")
    if flags.examples < 1:
        parser.error(f"--examples must be >= 1, got {flags.examples}")

    print(timing.machine())
    if flags.run is None:
        nets = {name: untrained(name) for name in flags.nets}
    else:
        try:
            run = trained.load(flags.run)
        except ExperimentError as error:
            sys.exit(f"error: {error}")
        nets = {run.config.model.name: of_run(run, flags.examples)}
    for name, net in nets.items():
        fitting = NETS[name].methods if name in NETS else tuple(METHODS)
        print(
            f"{name}, {len(net.images)} examples, eps {flags.eps}: median of {flags.repeats} runs",
            flush=True,
        )
        candidates, worth = measure(net, tuple(flags.methods or fitting), flags.eps)
        timing.interleave(candidates, flags.repeats)
        timing.report(candidates, candidates[0], worth)
    print(f"peak memory {timing.peak_memory_mib():.0f} MiB")


if __name__ == "__main__":
    main()
