"""Compares bounds of random networks with the values of the networks, for every `rounding=`.

    python -m experiments.benchmarks.rounding --networks 10000 --seed 0

Every network (`rounding_networks`) is bounded from below on balls of several radii by every method.
The bounds are compared with values at points of the ball: its center, the points that the gradients
name, and a random one.

* `real`: values in float64, whose own rounding is bounded, so a violation is certain;
* `programs`: values that 20 programs compute in float32 from float32 points of the ball. They are
  XLA's for a batch of networks, for a batch of points, for one point at a time and op by op, and 16
  orders of summation.

A row says for how many bounds a value lies below, by how much at most, and how much of the distance
to the bound that is not rounded (`nearest`) values use up at most: at 100 % a bound is attained.
`"real"` promises that no value in float64 lies below, `"float32"` that no value does. The exit
status is 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import boundjax as bj
from boundjax import cache
from boundjax.sets.rounding import Rounding
from experiments.benchmarks import timing
from experiments.benchmarks.rounding_networks import (
    ARCHITECTURES,
    ORDERS,
    OUTPUTS,
    Architecture,
    Certain,
    Certified64,
    Order,
    Ordered,
    Ordinary,
    Weights,
    draw,
)

ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
RADII = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
# Networks that are bounded and computed at once.
BATCH = 64
# The specification: logits and margins.
ROWS = np.asarray([[1, 0, 0, 0], [0, -1, 0, 0], [1, -1, 0, 0], [0, 0, -1, 1]], np.float32)
assert ROWS.shape[1] == OUTPUTS

_Transform = Callable[..., Callable[..., Any]]
METHODS: Mapping[str, _Transform] = {
    "interval": bj.interval,
    "crown-ibp": functools.partial(bj.linear, sides="lower"),
    "crown": functools.partial(bj.linear, sides="lower", intermediate="linear"),
    "forward": bj.forward_linear,
    "lmt": functools.partial(bj.lipschitz, box=False),
    "bcp": functools.partial(bj.lipschitz, box=True),
}
LIPSCHITZ = ("lmt", "bcp")


class Ball(NamedTuple):
    """A kind of input set: the order of the norm, and the range of valid inputs or None."""

    norm: float
    clip: tuple[float, float] | None


BALLS: Mapping[str, Ball] = {"linf": Ball(np.inf, (0.0, 1.0)), "l2": Ball(2.0, None)}


@dataclasses.dataclass
class Tally:
    """What was counted of one kind of network, ball and rounding.

    Attributes:
      bounds: number of bounds.
      missing: how many of them are not finite.
      above_real: how many lie above a value in float64.
      above_programs: how many lie above a value of a float32 program.
      excess: by how much at most.
      used: the largest share of the slack that a value used up.
    """

    bounds: int = 0
    missing: int = 0
    above_real: int = 0
    above_programs: int = 0
    excess: float = 0.0
    used: float = 0.0

    def add(self, bound: np.ndarray, plain: np.ndarray, real: np.ndarray, run: np.ndarray) -> None:
        """Compares bounds with the least values that were met, all `[N]`, float64.

        Args:
          bound: lower bounds.
          plain: the same with rounding `"nearest"`.
          real: at least the least value in float64.
          run: the least value of a float32 program.
        """
        self.bounds += bound.size
        finite = np.isfinite(bound)
        self.missing += int((~finite).sum())
        bound, plain, real, run = (array[finite] for array in (bound, plain, real, run))
        self.above_real += int((bound > real).sum())
        self.above_programs += int((bound > run).sum())
        least = np.minimum(real, run)
        self.excess = max(self.excess, float(np.max(bound - least, initial=0.0)))
        slack = plain - bound
        used = np.where(slack > 0, plain - least, 0.0) / np.where(slack > 0, slack, 1.0)
        self.used = max(self.used, float(np.max(used, initial=0.0)))

    def broken(self, rounding: Rounding) -> bool:
        """Whether this contradicts what a rounding promises."""
        if rounding == "nearest":
            return False
        return bool(
            self.missing or self.above_real or (rounding == "float32" and self.above_programs)
        )


def bounds_of(
    architecture: Architecture, ball: Ball, method: str, rounding: Rounding
) -> Callable[..., Array]:
    """Compiles `(weights, x, eps) -> lower bounds [B, R]` of a batch of networks."""

    def one(weights: Weights, x: Array, eps: Array) -> Array:
        transform = METHODS[method](
            lambda x: architecture.apply(Ordinary(), weights, x), rounding=rounding
        )
        return transform(bj.LpBall(x, eps, ball.norm, ball.clip), jnp.asarray(ROWS)).lower

    return jax.jit(jax.vmap(one, in_axes=(0, 0, None)))


class Programs:
    """Every way in which the networks of an architecture are computed, compiled for a batch.

    Weights have a leading axis `B` of networks, points have axes `[B, P]`.
    """

    def __init__(self, architecture: Architecture) -> None:
        """Nothing is compiled before it is used."""
        apply = architecture.apply
        ordinary = functools.partial(apply, Ordinary())
        points = jax.vmap(ordinary, in_axes=(None, 0))
        batch = jax.vmap(points)

        def exact(weights: Weights, x: Array) -> Certain:
            x = x.astype(jnp.float64)
            return apply(Certified64(), weights, Certain(x, jnp.zeros_like(x)))

        def slopes(weights: Weights, x: Array) -> Array:
            return jax.jacrev(lambda x: jnp.asarray(ROWS) @ ordinary(weights, x))(x)

        def ordered(weights: Weights, x: Array, orders: Order) -> Array:
            def in_order(order: Order) -> Array:
                compute = functools.partial(apply, Ordered(order))
                return jax.vmap(jax.vmap(compute, in_axes=(None, 0)))(weights, x)

            return jax.lax.map(in_order, orders)

        def one_by_one(weights: Weights, x: Array) -> Array:
            return jax.lax.map(
                lambda network: jax.lax.map(lambda x: ordinary(network[0], x), network[1]),
                (weights, x),
            )

        self._exact = jax.jit(jax.vmap(jax.vmap(exact, in_axes=(None, 0))))
        self._slopes = jax.jit(jax.vmap(slopes))
        self._ordered = jax.jit(ordered)
        self._others = (
            jax.jit(batch),
            jax.jit(lambda weights, x: jax.lax.map(lambda pair: points(*pair), (weights, x))),
            jax.jit(one_by_one),
            batch,  # not compiled as a whole: op by op
        )

    def slopes(self, weights: Weights, x: np.ndarray) -> np.ndarray:
        """The gradients `[B, R, *input]` of the rows at inputs `[B, *input]`."""
        return np.asarray(self._slopes(weights, x), np.float64)

    def exact(self, weights: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values in float64 and bounds on their errors, `[B, P, R]`, for points in float64."""
        with jax.enable_x64(True):
            value, error = (np.asarray(array) for array in self._exact(weights, jnp.asarray(x)))
        rows = ROWS.astype(np.float64).T
        rounded = 2.0**-50 * (np.abs(value) @ np.abs(rows))
        return value @ rows, error @ np.abs(rows) * (1.0 + 1e-12) + rounded

    def run(self, weights: Weights, x: np.ndarray) -> np.ndarray:
        """The rows of every program's values, `[E, B, P, R]`, for float32 points."""
        orders = Order(*map(jnp.asarray, np.asarray(ORDERS, np.int32).T))
        of_programs = [np.asarray(program(weights, x)) for program in self._others]
        values = np.concatenate(
            [np.stack(of_programs), np.asarray(self._ordered(weights, x, orders))]
        )
        # Differences of two float32 numbers of similar size are exact.
        return values.astype(np.float64) @ ROWS.astype(np.float64).T


EXECUTIONS = 4 + len(ORDERS)


def members(
    ball: Ball, x: np.ndarray, eps: np.float32, slopes: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Points of balls around inputs, exactly inside, float64 `[B, P, *input]`.

    The first is the center, the next minimize linear functions, the last is random.

    Args:
      ball: the kind of ball.
      x: `[B, *input]`, float32, inside of the clip range.
      eps: the radius.
      slopes: of the linear functions, `[B, R, *input]`.
      random: generator.
    """
    center = x.astype(np.float64)[:, None]
    noise = random.normal(size=center.shape)
    axes = tuple(range(2, center.ndim))
    if ball.norm == np.inf:
        directions = [-np.sign(slopes), np.clip(noise, -1.0, 1.0)]
    else:
        directions = []
        for array in (-slopes, noise):
            length = np.sqrt(np.sum(array * array, axis=axes, keepdims=True))
            # Slightly too short, so that rounding leads out of no ball.
            directions.append(array / np.where(length > 0, length, 1.0) * (1.0 - 1e-12))
    offsets = np.float64(eps) * np.concatenate(directions, axis=1)
    points = center + offsets
    part = points - center
    error = (center - (points - part)) + (offsets - part)
    points = np.where(error != 0, np.nextafter(points, center), points)
    if ball.clip is not None:
        points = np.clip(points, *ball.clip)
    return np.concatenate([center, points], axis=1)


def towards(points: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The next float32 points towards the centers `[B, *input]`: they stay in every ball."""
    center = np.broadcast_to(x[:, None], points.shape)
    rounded = points.astype(np.float32)
    farther = np.abs(rounded - center.astype(np.float64)) > np.abs(points - center)
    return np.where(farther, np.nextafter(rounded, center), rounded)


def compare(
    architecture: Architecture,
    ball: Ball,
    networks: int,
    seed: int,
    radii: tuple[float, ...] = RADII,
    methods: tuple[str, ...] | None = None,
) -> dict[Rounding, Tally]:
    """Bounds random networks on balls of every radius and compares the bounds with values.

    Args:
      architecture: the kind of network.
      ball: the kind of ball.
      networks: how many.
      seed: of weights, inputs and points.
      radii: of the balls.
      methods: of `METHODS`; None for all that apply.

    Returns:
      What was counted, for every rounding.
    """
    if methods is None:
        methods = tuple(m for m in METHODS if architecture.lipschitz or m not in LIPSCHITZ)
    random, programs = np.random.default_rng(seed), Programs(architecture)
    compiled = {
        (method, rounding): bounds_of(architecture, ball, method, rounding)
        for method in methods
        for rounding in ROUNDINGS
    }
    tallies: dict[Rounding, Tally] = {rounding: Tally() for rounding in ROUNDINGS}
    for start in range(0, networks, BATCH):
        weights, x = draw(architecture, BATCH, random)
        kept = min(BATCH, networks - start)
        slopes = programs.slopes(weights, x)
        for radius in radii:
            eps = np.float32(radius)
            points = members(ball, x, eps, slopes, random)
            single = towards(points, x)
            value, error = programs.exact(weights, np.concatenate([points, single], axis=1))
            real = (value + error).min(1)[:kept].reshape(-1)
            run = programs.run(weights, single).min((0, 2))[:kept].reshape(-1)
            for method in methods:
                lower = {
                    rounding: np.asarray(compiled[method, rounding](weights, x, eps), np.float64)
                    for rounding in ROUNDINGS
                }
                lower = {rounding: array[:kept].reshape(-1) for rounding, array in lower.items()}
                for rounding in ROUNDINGS:
                    tallies[rounding].add(lower[rounding], lower["nearest"], real, run)
    return tallies


def _share(count: int, total: int) -> str:
    return f"{count:7,} ({count / max(total, 1):6.2%})"


def main() -> None:
    """Reads the flags and prints a row per architecture, ball and rounding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", type=int, default=10_000, help="in all (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the networks (default: 0)")
    parser.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, metavar="NAME",
        default=list(ARCHITECTURES), help="default: all, " + ", ".join(ARCHITECTURES),
    )  # fmt: skip
    flags = parser.parse_args()
    if flags.networks < 1:
        parser.error(f"--networks must be >= 1, got {flags.networks}")
    if flags.seed < 0:
        parser.error(f"--seed must be >= 0, got {flags.seed}")
    cells = [(name, ball) for name in flags.architectures for ball in BALLS]
    each = -(-flags.networks // len(cells))
    cache.enable_if_possible()
    print(timing.machine())
    print(
        f"{each * len(cells):,} networks, {each:,} of each kind, radii "
        f"{' '.join(f'{radius:g}' for radius in RADII)}, {EXECUTIONS} float32 programs; seed "
        f"{flags.seed}"
    )
    print(
        f"{'network':<16} {'ball':<4}  {'rounding':<8} {'bounds':>9}  {'above real':>17}  "
        f"{'above programs':>17}  {'at most by':>10}  {'slack used':>10}  {'not finite':>10}"
    )
    broken = []
    for place, (name, ball) in enumerate(cells):
        architecture = ARCHITECTURES[name]
        seed = int(np.random.SeedSequence([flags.seed, place]).generate_state(1)[0])
        for rounding, tally in compare(architecture, BALLS[ball], each, seed, RADII).items():
            broken += [f"{name}, {ball}, {rounding}"] * tally.broken(rounding)
            used = "" if rounding == "nearest" else f"{tally.used:.1%}"
            print(
                f"{name:<16} {ball:<4}  {rounding:<8} {tally.bounds:9,}  "
                f"{_share(tally.above_real, tally.bounds):>17}  "
                f"{_share(tally.above_programs, tally.bounds):>17}  {tally.excess:10.2g}  "
                f"{used:>10}  {tally.missing:10,}",
                flush=True,
            )
        jax.clear_caches()  # of programs that no other kind of network uses
    if broken:
        sys.exit(f"error: promises are broken: {'; '.join(broken)}")


if __name__ == "__main__":
    main()
