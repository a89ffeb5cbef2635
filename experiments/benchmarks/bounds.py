"""Times interval, CROWN-IBP and CROWN margins, as ratios to a forward pass in the same process.

    python -m experiments.benchmarks.bounds

16 random images, 9 margins each, clipped l-infinity ball, untrained weights; nets: the MLP
784-100-100-10 and Small* (`experiments.models`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import boundjax as bj
from experiments import models
from experiments.benchmarks import timing

IMAGE_SHAPE = (28, 28, 1)
EXAMPLES = 16
NETS = ("mlp_2x100", "small_star")
METHODS: dict[str, Callable[[Callable[[jax.Array], jax.Array]], Callable[..., Any]]] = {
    "interval": bj.interval,
    "crown-ibp": partial(bj.linear, intermediate="interval"),
    "crown": partial(bj.linear, intermediate="linear"),
}


def measure(net: str, eps: float) -> tuple[list[timing.Measured], dict[str, str]]:
    """The forward pass and every method on one net, compiled; and what the bounds are worth."""
    model = models.create(net)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(EXAMPLES, *IMAGE_SHAPE)).astype(np.float32)
    variables = model.init(jax.random.key(0), jnp.asarray(images[:1]))
    labels = jnp.argmax(model.apply(variables, images), axis=-1)
    specifications = bj.margin_specification(labels, 10)

    def bound(method: str, variables: Any, images: jax.Array, rows: jax.Array) -> bj.Interval:
        transform = METHODS[method](lambda x: model.apply(variables, x[None])[0])
        ball = partial(bj.LpBall, eps=eps, clip=(0.0, 1.0))
        return jax.vmap(lambda x, rows: transform(ball(x), rows))(images, rows)

    candidates = [timing.compiled("forward", model.apply, variables, images)]
    worth = {}
    for method in METHODS:
        candidate = timing.compiled(
            method, partial(bound, method), variables, images, specifications
        )
        bounds = candidate.run()
        worth[method] = (
            f"mean margin {jnp.mean(bounds.lower):9.4f}  mean width {jnp.mean(bounds.width):8.4f}"
        )
        candidates.append(candidate)
    return candidates, worth


def main() -> None:
    """Reads the flags, prints one table per net."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--repeats", type=int, default=20, help="timed runs (default: 20)")
    parser.add_argument("--eps", type=float, default=0.02, help="pixel radius (default: 0.02)")
    flags = parser.parse_args()
    if flags.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {flags.repeats}")
    if not flags.eps >= 0:
        parser.error(f"--eps must be >= 0, got {flags.eps}")

    print(timing.machine())
    for net in flags.nets:
        print(
            f"{net}, {EXAMPLES} examples, eps {flags.eps}: median of {flags.repeats} runs",
            flush=True,
        )
        candidates, worth = measure(net, flags.eps)
        timing.interleave(candidates, flags.repeats)
        timing.report(candidates, candidates[0], worth)
    print(f"peak memory {timing.peak_memory_mib():.0f} MiB")


if __name__ == "__main__":
    main()
