"""Times the bounds of every method, as ratios to a forward pass in the same process.

    python -m experiments.benchmarks.bounds

The inputs are random images, 9 margins each, with a clipped l-infinity ball and untrained weights.
The nets are the MLP 784-100-100-10, Small* and CNN-7 (`experiments.models`). The mean margin
measures a method's tightness; methods with interval intermediate bounds come first, the loosest
before all. `--run FOLDER` takes the trained network of a run of `experiments.main` and its first
test images.

    python -m experiments.benchmarks.bounds --peer auto_LiRPA

compares the methods that auto_LiRPA also has (`experiments.benchmarks.side_by_side`).

    python -m experiments.benchmarks.bounds --rounding nearest real float32

times every method in each of these arithmetics, and says how much of its margin each one costs.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import jax.numpy as jnp

from boundjax.sets.rounding import Rounding
from experiments.benchmarks import process, side_by_side, timing
from experiments.benchmarks.cases import METHODS, NETS, Bounded, bound, specifications, untrained
from experiments.evaluation import trained
from experiments.methods.method import apply
from experiments.settings.errors import ExperimentError


def of_run(run: trained.Trained, examples: int) -> Bounded:
    """Takes a trained network and its first test images."""
    images = jnp.asarray(run.test.images[:examples])
    return Bounded(partial(apply, run.model), run.variables, images)


def measure(
    net: Bounded, methods: tuple[str, ...], eps: float, roundings: tuple[Rounding, ...]
) -> tuple[list[timing.Measured], dict[str, str]]:
    """Compiles the forward pass and every method on one net; computes the mean margins.

    With several arithmetics a margin's loss is relative to the first one.
    """
    _, rows = specifications(net)
    candidates = [timing.compiled("forward", net.apply, net.variables, net.images)]
    margins = {}
    for method in methods:
        first = None
        for rounding in roundings:
            name = method if len(roundings) == 1 else f"{method}, {rounding}"
            function = partial(bound, net.apply, method, eps, rounding=rounding)
            candidate = timing.compiled(name, function, net.variables, net.images, rows)
            lower = candidate.run().lower
            first = lower if first is None else first
            margins[name] = f"mean margin {jnp.mean(lower):9.4f}"
            if len(roundings) > 1:
                margins[name] += f", at most {jnp.max(first - lower):.1e} lost"
            candidates.append(candidate)
    return candidates, margins


def main() -> None:
    """Reads the flags and prints one table per net."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--nets", nargs="+", choices=NETS, help="default: the MLP and Small*; all with --peer"
    )
    parser.add_argument("--run", type=Path, help="a run folder: bounds of its network instead")
    parser.add_argument(
        "--examples", type=int, default=16, help="test images with --run (default: 16)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that fit")
    timing.add_repeats(parser, 20)
    parser.add_argument("--eps", type=float, default=0.02, help="pixel radius (default: 0.02)")
    parser.add_argument(
        "--rounding",
        nargs="+",
        choices=get_args(Rounding),
        default=["nearest"],
        help="what the bounds hold for (default: nearest)",
    )
    side_by_side.add_flags(parser)
    flags = parser.parse_args()
    if not flags.eps >= 0:
        parser.error(f"--eps must be >= 0, got {flags.eps}")
    if flags.examples < 1:
        parser.error(f"--examples must be >= 1, got {flags.examples}")

    if flags.peer is not None:
        if flags.run is not None:
            parser.error("--peer compares untrained networks: leave out --run")
        try:
            side_by_side.compare(flags)
        except ExperimentError as error:
            sys.exit(f"error: {error}")
        return
    print(timing.machine())
    if flags.run is None:
        nets = {name: untrained(name) for name in flags.nets or ("mlp_2x100", "small_star")}
    else:
        try:
            run = trained.load(flags.run)
        except ExperimentError as error:
            sys.exit(f"error: {error}")
        nets = {run.config.model.name: of_run(run, flags.examples)}
    for name, net in nets.items():
        methods = flags.methods or (NETS[name].methods if name in NETS else METHODS)
        print(
            f"{name}, {len(net.images)} examples, eps {flags.eps}: median of {flags.repeats} runs",
            flush=True,
        )
        candidates, margins = measure(net, tuple(methods), flags.eps, tuple(flags.rounding))
        timing.interleave(candidates, flags.repeats)
        timing.report(candidates, candidates[0], margins)
    print(f"peak memory {process.peak_memory_mib():.0f} MiB")


if __name__ == "__main__":
    main()
