"""Times train steps on random images, as ratios to standard training in the same process.

    python -m experiments.benchmarks.train_step

The step is the loop's own (`experiments.train_step`), halfway up the ramp, where every term of the
objective is computed. Nets: Small* at batch 128 and CNN-7 at batch 32 (`experiments.models`);
CROWN-IBP bounds all 9 margins.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np

from experiments import methods, models
from experiments.benchmarks import process, timing
from experiments.config import OptimConfig, RobustConfig
from experiments.train_step import (
    create_optimizer,
    create_schedule,
    create_state,
    create_train_step,
)

STEPS_PER_EPOCH = 100
IMAGE_SHAPES = {"small_star": (28, 28, 1), "cnn7": (32, 32, 3)}
BATCH_SIZES = {"small_star": 128, "cnn7": 32}


def measure(net: str, method: str, batch_size: int) -> timing.Measured:
    """The compiled train step of a method, halfway up the ramp of the radius."""
    model = models.create(net)
    image_shape = IMAGE_SHAPES[net]
    robust = RobustConfig(method=method, ramp_epochs=1.0)
    schedule = create_schedule(robust, STEPS_PER_EPOCH)
    optimizer = create_optimizer(OptimConfig(), STEPS_PER_EPOCH)
    state = create_state(model, optimizer, image_shape, jax.random.key(0))
    state["step"] = state["step"] + STEPS_PER_EPOCH // 2
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(batch_size, *image_shape)).astype(np.float32)
    labels = rng.integers(0, 10, size=batch_size).astype(np.int32)
    step = create_train_step(
        model,
        methods.get(method).objectives[-1],
        optimizer,
        schedule,
        STEPS_PER_EPOCH,
        clip=(0.0, 1.0),
    )
    return timing.compiled(method, step, state, images, labels)


def main() -> None:
    """Reads the flags, prints one table per net."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=BATCH_SIZES, default=list(BATCH_SIZES))
    timing.add_repeats(parser, 20)
    parser.add_argument(
        "--full",
        action="store_true",
        help="CROWN-IBP on CNN-7 too (minutes per step on 2 CPU cores)",
    )
    flags = parser.parse_args()

    print(timing.machine())
    for net in flags.nets:
        batch_size = BATCH_SIZES[net]
        slow = net == "cnn7" and not flags.full
        names = ["natural", "ibp"] if slow else ["natural", "ibp", "crown_ibp"]
        print(f"{net}, batch {batch_size}: median of {flags.repeats} train steps", flush=True)
        steps = [measure(net, name, batch_size) for name in names]
        timing.interleave(steps, flags.repeats)
        timing.report(steps, steps[0], {})
    print(f"peak memory {process.peak_memory_mib():.0f} MiB")


if __name__ == "__main__":
    main()
