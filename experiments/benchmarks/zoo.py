"""Measures how models of many kinds are certified as they are.

    python -m experiments.benchmarks.zoo

For every model of `experiments.models.zoo`, handed over as its users would: the seconds until the
first answer and those of a second call with other inputs (by `--time`, compiled code is kept), the
memory that the compiler plans for one call, and by method the mean width of the margins beside the
mean change that an attack attains. No bound can be narrower than that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import boundjax as bj
from boundjax.certification.presets import Method
from experiments.benchmarks import timing
from experiments.models.zoo import ZOO, ZooModel

METHODS: tuple[Method, ...] = ("interval", "crown-ibp", "crown", "alpha-crown")


def attained(entry: ZooModel, steps: int = 20, restarts: int = 4) -> np.ndarray:
    """The least margins `[B, ..., C]` that signed gradient steps reach inside the box.

    Every class of every position is attacked on its own.
    """
    x, constants = jnp.asarray(entry.x), entry.options.get("constants")
    labels = entry.logits(x, constants).argmax(-1)

    def margins(z: jax.Array) -> jax.Array:
        logits = entry.logits(z, constants)
        return jnp.take_along_axis(logits, labels[..., None], axis=-1) - logits

    shape = jax.eval_shape(margins, x).shape

    @jax.jit
    def one(start: jax.Array, weights: jax.Array) -> jax.Array:
        def step(z: jax.Array, _: None) -> tuple[jax.Array, None]:
            gradient = jax.grad(lambda z: jnp.sum(margins(z) * weights))(z)
            moved = z - 0.2 * entry.eps * jnp.sign(gradient)
            return jnp.clip(moved, x - entry.eps, x + entry.eps), None

        return margins(jax.lax.scan(step, start, length=steps)[0])

    least = np.asarray(margins(x))
    rng = np.random.default_rng(0)
    for flat in range(int(np.prod(shape[1:]))):
        weights = np.zeros((shape[0], int(np.prod(shape[1:]))), np.float32)
        weights[:, flat] = 1.0
        for _ in range(restarts):
            start = entry.x + entry.eps * rng.uniform(-1.0, 1.0, entry.x.shape).astype(np.float32)
            least = np.minimum(least, one(jnp.asarray(start), jnp.asarray(weights.reshape(shape))))
    return least


def timed(call: Callable[..., bj.Certificate], *arguments: Any) -> tuple[bj.Certificate, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    result = call(*arguments)
    return result, time.perf_counter() - start


def row(kind: str, methods: Sequence[Method], measured: Method) -> list[str]:
    """Measures one model; the cells of its row."""
    entry = ZOO[kind]()
    rng = np.random.default_rng(1)
    other = (entry.x + 0.1 * entry.eps * rng.uniform(size=entry.x.shape)).astype(np.float32)

    def certify(x: np.ndarray, eps: float, method: Method) -> bj.Certificate:
        return bj.certify(entry.model, x, eps, method=method, **entry.options)

    first, seconds = timed(certify, entry.x, entry.eps, measured)
    _, again = timed(certify, other, entry.eps, measured)
    memory = bj.memory_estimate(entry.model, entry.x, method=measured, **entry.options)
    exact = certify(entry.x, 0.0, "interval").margins
    rivals = np.arange(exact.shape[-1]) != first.labels[..., None]
    widths = []
    for method in methods:
        certificate = first if method == measured else certify(entry.x, entry.eps, method)
        widths.append(f"{(exact - certificate.margins)[rivals].mean():.3g}")
    return [
        kind,
        f"{entry.eps:g}",
        first.arithmetic,
        f"{seconds:.1f} s",
        f"{1e3 * again:.0f} ms",
        f"{memory.peak / 1e6:.2g} MB",
        f"{(exact - attained(entry))[rivals].mean():.3g}",
        *widths,
    ]


def main() -> None:
    """Reads the flags and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=ZOO, default=list(ZOO))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:3]))
    parser.add_argument(
        "--time", choices=METHODS, default="crown-ibp", help="the method timed (default: crown-ibp)"
    )
    flags = parser.parse_args()
    print(timing.machine())
    header = ["model", "eps", "rounding", "first", "second", "memory", "attained", *flags.methods]
    print(f"| {' | '.join(header)} |")
    print(f"|{' --- |' * len(header)}")
    for kind in flags.kinds:
        print(f"| {' | '.join(row(kind, flags.methods, flags.time))} |", flush=True)


if __name__ == "__main__":
    main()
