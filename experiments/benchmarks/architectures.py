"""Measures times and widths of every method on small members of the architecture families.

    python -m experiments.benchmarks.architectures

Each method bounds all logits from both sides, around one random input, on an l-infinity ball of
radius `--eps` (`experiments.models.families`). `attained` is the mean range that random points and
a sign-gradient attack reach; no bound can be narrower.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import boundjax as bj
from experiments.benchmarks import timing
from experiments.models.families import FAMILIES

METHODS: dict[str, Callable[[Callable[[jax.Array], jax.Array]], Callable[..., Any]]] = {
    "interval": bj.interval,
    "crown-ibp": bj.linear,
    "crown": partial(bj.linear, intermediate="linear"),
    "alpha-crown": partial(
        bj.linear,
        slopes=bj.optimized(
            20,
            optax.adam(optax.exponential_decay(0.5, transition_steps=1, decay_rate=0.9)),
            per_spec=True,
            optimize_intermediate=True,
        ),
        intermediate="linear",
    ),
}


def attained(model: Callable[[jax.Array], jax.Array], x: jax.Array, eps: float) -> jax.Array:
    """Computes the mean range of the logits over attacked points of the ball."""
    directions = jnp.concatenate([jnp.eye(4), -jnp.eye(4)])

    def climb(direction: jax.Array) -> jax.Array:
        def step(z: jax.Array, _: None) -> tuple[jax.Array, None]:
            gradient = jax.grad(lambda z: model(z[None])[0] @ direction)(z)
            return jnp.clip(z + 0.2 * eps * jnp.sign(gradient), x - eps, x + eps), None

        return jax.lax.scan(step, x, None, length=20)[0]

    logits = model(jax.vmap(climb)(directions))
    return jnp.mean(logits.max(0) - logits.min(0))


def main() -> None:
    """Reads the flags and prints one table per family."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["interval", "crown-ibp", "crown"]
    )
    timing.add_repeats(parser, 5)
    parser.add_argument("--eps", type=float, default=0.01, help="radius (default: 0.01)")
    flags = parser.parse_args()
    print(timing.machine())
    for name in flags.families:
        family = FAMILIES[name]
        model = family.model(0)
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.uniform(size=family.input_shape), jnp.float32)
        reached = float(jax.jit(partial(attained, model))(x, flags.eps))
        print(f"{name}: {family.layers}; eps {flags.eps}, attained {reached:.4g}", flush=True)
        candidates = [timing.compiled("forward", model, x[None])]
        widths = {}
        for method in flags.methods:
            bounds = METHODS[method](lambda z, model=model: model(z[None])[0])
            candidate = timing.compiled(
                method, lambda z, bounds=bounds: bounds(bj.LpBall(z, flags.eps)), x
            )
            widths[method] = f"mean width {float(jnp.mean(candidate.run().width)):.4g}"
            candidates.append(candidate)
        timing.interleave(candidates, flags.repeats)
        timing.report(candidates, candidates[0], widths)


if __name__ == "__main__":
    main()
