"""Times the bounds of every method, as ratios to a forward pass in the same process.

    python -m experiments.benchmarks.bounds

Random images, 9 margins each, clipped l-infinity ball, untrained weights; nets: the MLP
784-100-100-10, Small* and CNN-7 (`experiments.models`). The mean margin says what a
method is worth; those with intermediate bounds by intervals come first, the loosest before all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import boundjax as bj
from boundjax.training import robust_cross_entropy
from experiments import models
from experiments.benchmarks import timing


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


def measure(name: str, eps: float) -> tuple[list[timing.Measured], dict[str, str]]:
    """The forward pass and every method on one net, compiled; and what the bounds are worth."""
    net, model = NETS[name], models.create(name)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(net.examples, *net.image_shape)).astype(np.float32)
    variables = model.init(jax.random.key(0), jnp.asarray(images[:1]))
    labels = jnp.argmax(model.apply(variables, images), axis=-1)
    specifications = bj.margin_specification(labels, 10)

    def bound(method: str, variables: Any, images: jax.Array, rows: jax.Array) -> bj.Interval:
        transform = METHODS[method](lambda x: model.apply(variables, x[None])[0])
        ball = partial(bj.LpBall, eps=eps, clip=(0.0, 1.0))
        return jax.vmap(lambda x, rows: transform(ball(x), rows))(images, rows)

    candidates = [timing.compiled("forward", model.apply, variables, images)]
    worth = {}
    for method in net.methods:
        candidate = timing.compiled(
            method, partial(bound, method), variables, images, specifications
        )
        bounds = candidate.run()
        worth[method] = f"mean margin {jnp.mean(bounds.lower):9.4f}"
        candidates.append(candidate)
    return candidates, worth


def main() -> None:
    """Reads the flags, prints one table per net."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["mlp_2x100", "small_star"])
    timing.add_repeats(parser, 20)
    parser.add_argument("--eps", type=float, default=0.02, help="pixel radius (default: 0.02)")
    flags = parser.parse_args()
    if not flags.eps >= 0:
        parser.error(f"--eps must be >= 0, got {flags.eps}")

    print(timing.machine())
    for net in flags.nets:
        examples = NETS[net].examples
        print(
            f"{net}, {examples} examples, eps {flags.eps}: median of {flags.repeats} runs",
            flush=True,
        )
        candidates, worth = measure(net, flags.eps)
        timing.interleave(candidates, flags.repeats)
        timing.report(candidates, candidates[0], worth)
    print(f"peak memory {timing.peak_memory_mib():.0f} MiB")


if __name__ == "__main__":
    main()
