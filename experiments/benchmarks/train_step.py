"""Times train steps on random images, as ratios to standard training in the same process.

    python -m experiments.benchmarks.train_step

The step is that of the training loop (`experiments.train.step`), halfway up the ramp, where it
computes every term of the objective. The nets (`experiments.models`) are Small* at batch 128 and
CNN-7 at batch 32 for the l-infinity methods, and 4C3F ("medium") at batch 128 for the l2 methods
BCP and LMT, whose step includes one power iteration. Every method except fused CROWN-IBP bounds all
9 margins. Attacks take one step. The methods for random networks are timed on Small* with Gaussian
weights, GradDiv with three draws; after the table the counted passes are compared with the time: a
forward pass, and a backward pass to the activations or to the weights, count as one each. An attack
step has 2, the loss 3, the clean metrics 1, and a draw of GradDiv 2 and their 4 transposes. The
peak is the compiler's estimate for one step with its inputs
and outputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import methods, models
from experiments.benchmarks import timing
from experiments.settings.checks import from_config_dict
from experiments.train.step import (
    create_optimizer,
    create_schedule,
    create_state,
    create_train_step,
)

STEPS_PER_EPOCH = 100


class Case(NamedTuple):
    """The images, methods and ball of a network's train step."""

    image_shape: tuple[int, int, int]
    batch_size: int
    methods: tuple[str, ...]  # of `METHODS`; the first is the baseline
    norm: str = "inf"
    eps: float = 0.1


# Settings of the configuration besides the method's name.
_FAST = {"regularizers": {"tightness": 0.5, "relu_balance": 0.5}, "model": {"init": "ibp"}}
_ADV_BNN = {"method": "adv-bnn", "random": {"prior_std": 0.05}, "adversary": {"steps": 1}}
_RANDOM: dict[str, dict[str, Any]] = {
    "adv-train": {"adversary": {"steps": 1}},
    "rse": {"random": {"noise": (0.2, 0.1)}},
    "adv-bnn": _ADV_BNN,
    "adv-bnn, graddiv": {**_ADV_BNN, "diversity": {"weight": 1.0, "draws": 3}},
}
# Passes through the network: forward, backward to the activations, backward to the weights.
PASSES = {
    "natural": 3,
    "adv-train": 2 + 3 + 1,
    "rse": 3,
    "adv-bnn": 2 + 3 + 1,
    "adv-bnn, graddiv": 2 + 3 + 1 + 3 * (2 + 4),
}
METHODS: dict[str, dict[str, Any]] = {
    "natural": {},
    "ibp": {},
    "short warm-up": {"method": "ibp", **_FAST},
    "crown-ibp": {},
    "crown-ibp, fused": {"method": "crown-ibp", "relaxation": {"fused": True}},
    "one-step": {},
    "bcp": {},
    "lmt": {},
    "sabr": {"adversary": {"steps": 1}},
    "mtl-ibp": {"adversary": {"steps": 1}},
    **_RANDOM,
}
_LINF = ("natural", "ibp", "short warm-up", "crown-ibp, fused", "crown-ibp", "one-step")
CASES = {
    "small_star": Case((28, 28, 1), 128, (*_LINF, "sabr", "mtl-ibp", *_RANDOM)),
    "cnn7": Case((32, 32, 3), 32, (*_LINF, "sabr", "mtl-ibp")),
    "medium": Case((28, 28, 1), 128, ("natural", "bcp", "lmt"), norm="2", eps=1.58),
}


def measure(net: str, name: str) -> timing.Measured:
    """Compiles the train step of a method, halfway up the ramp of the radius."""
    case, settings = CASES[net], dict(METHODS[name])
    robust = {
        "method": settings.pop("method", name),
        "norm": case.norm,
        "eps_train": case.eps,
        "eps_test": case.eps,
    }
    model_config = {"name": net, **settings.pop("model", {})}
    config = from_config_dict({"robust": robust, "model": model_config, **settings})
    model = models.from_config(config.model, config.random)
    method = methods.create(model, config, images=60_000)
    schedule = create_schedule(config.robust, STEPS_PER_EPOCH)
    optimizer = create_optimizer(config.optim, STEPS_PER_EPOCH)
    key = jax.random.key(0)
    state = create_state(method, model, optimizer, case.image_shape, key)
    state["step"] = state["step"] + STEPS_PER_EPOCH // 2
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(case.batch_size, *case.image_shape)).astype(np.float32)
    labels = rng.integers(0, 10, size=case.batch_size).astype(np.int32)
    phase = int(method.phase(schedule(state["step"])))
    step = create_train_step(
        model, method.objectives[phase], optimizer, schedule, STEPS_PER_EPOCH, key
    )
    return timing.compiled(name, step, state, images, labels)


def main() -> None:
    """Reads the flags and prints one table per net."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these, and natural")
    timing.add_repeats(parser, 20)
    parser.add_argument(
        "--full",
        action="store_true",
        help="bounds of all 9 margins on CNN-7 too (minutes per step on 2 CPU cores)",
    )
    flags = parser.parse_args()

    print(timing.machine())
    for net in flags.nets:
        slow = ("crown-ibp", "one-step") if net == "cnn7" and not flags.full else ()
        names = [name for name in CASES[net].methods if name not in slow]
        if flags.methods:
            names = [name for name in names if name in ("natural", *flags.methods)]
        print(
            f"{net}, batch {CASES[net].batch_size}: median of {flags.repeats} train steps",
            flush=True,
        )
        steps = [measure(net, name) for name in names]
        timing.interleave(steps, flags.repeats)
        memory = {step.name: f"peak {step.peak_bytes / 2**20:7.1f} MiB" for step in steps}
        timing.report(steps, steps[0], memory)
        report_passes({step.name: step.median for step in steps})


def report_passes(seconds: Mapping[str, float]) -> None:
    """Prints how the time of each random method compares with its counted passes.

    One pass takes a third of natural training's step.
    """
    for name in PASSES:
        if name in seconds and name != "natural":
            passes = PASSES[name] / PASSES["natural"]
            ratio = seconds[name] / seconds["natural"] / passes
            print(f"  {name}: {PASSES[name]} passes, {ratio:.2f}x the time of so many")
    if {"adv-bnn", "adv-bnn, graddiv"} <= seconds.keys():
        passes = PASSES["adv-bnn, graddiv"] / PASSES["adv-bnn"]
        ratio = seconds["adv-bnn, graddiv"] / seconds["adv-bnn"] / passes
        print(f"  GradDiv against Adv-BNN, whose passes draw weights as well: {ratio:.2f}x")


if __name__ == "__main__":
    main()
