"""Measures how a train step scales: its time, its communication, and estimates for other chips.

    python -m experiments.benchmarks.scaling

The measurement runs one step of the loop on random images, on 1, 2, 4 and 8 virtual devices of this
CPU and in 1 and 2 processes (`launch/local_multiprocess.py` starts them). The global batch stays
the same, so the devices of one machine share a fixed amount of work; any increase in time is the
cost of dividing it. Collectives are counted in the compiled program.

The estimate gives lower limits for a step on machines that are not at hand, from the FLOPs and
bytes of the program for one device and the makers' numbers in `MACHINES` (docs/scaling.md states
the assumptions).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from experiments.cluster import process_group
from experiments.settings.errors import ExperimentError, fail

_LAUNCHER = Path(__file__).resolve().parents[2] / "launch" / "local_multiprocess.py"
_SECONDS = 900.0


class Case(NamedTuple):
    """A network and its training settings on random images; the batch is global."""

    net: str
    shape: tuple[int, int, int]
    batch_size: int
    settings: dict[str, Any]


_FAST = {"regularizers": {"tightness": 0.5, "relu_balance": 0.5}, "model": {"init": "ibp"}}
_FUSED = {"relaxation": {"fused": True}}
CASES = {
    "ibp": Case("small_star", (28, 28, 1), 128, {"robust": {"method": "ibp"}}),
    "short warm-up, batch normalisation": Case(
        "small_star_bn", (28, 28, 1), 128, {"robust": {"method": "ibp"}, **_FAST}
    ),
    "crown-ibp": Case("small_star", (28, 28, 1), 128, {"robust": {"method": "crown-ibp"}}),
}
MESHES = {"data": {}, "fsdp": {"data": 1, "fsdp": -1}, "spec": {"data": 1, "spec": -1}}
# (processes, devices per process).
LAYOUTS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 4))


class Machine(NamedTuple):
    """The maker's numbers for each chip of a machine, in FLOP/s and bytes/s.

    Attributes:
      chips: the number of chips.
      flops: rate of matrix products at the precision of training (`train.precision="high"`).
      memory: bandwidth of the chip's memory.
      links: bandwidth out of one chip, to all others together, in one direction.
    """

    chips: int
    flops: float
    memory: float
    links: float


MACHINES = {
    # 197e12 in bfloat16, and "high" takes three passes; four links of 400 Gbit/s both ways.
    "v5e-256": Machine(256, 197e12 / 3, 819e9, 100e9),
    # TF32 without sparsity; NVLink of 900 GB/s both ways.
    "8 x H200": Machine(8, 494e12, 4.8e12, 450e9),
}
ESTIMATED = {
    "ibp": Case("cnn7", (32, 32, 3), 128, {"robust": {"method": "ibp"}}),
    "short warm-up": Case("cnn7", (32, 32, 3), 128, {"robust": {"method": "ibp"}, **_FAST}),
    "crown-ibp, fused": Case(
        "cnn7", (32, 32, 3), 128, {"robust": {"method": "crown-ibp"}, **_FUSED}
    ),
}


def compiled_step(case: Case, mesh: dict[str, int]) -> tuple[Any, Any, tuple[Any, ...]]:
    """Returns the lowered and the compiled step, halfway up the ramp, and its arguments."""
    import jax
    import numpy as np

    from experiments.data import Images, Splits
    from experiments.settings.checks import from_config_dict
    from experiments.train.feed import Feed
    from experiments.train.mesh import batch_sharding
    from experiments.train.prepare import prepare

    settings = dict(case.settings)
    model = {"name": case.net, **settings.pop("model", {})}
    config = from_config_dict(
        {
            "model": model,
            "train": {"epochs": 2, "batch_size": case.batch_size, "precision": "high"},
            "mesh": mesh,
            **settings,
            "robust": {"ramp_epochs": 2.0, "eps_train": 0.01, **settings["robust"]},
        }
    )
    rng = np.random.default_rng(0)
    images = Images(
        rng.uniform(size=(2 * case.batch_size, *case.shape)).astype(np.float32),
        rng.integers(0, 10, size=2 * case.batch_size).astype(np.int32),
    )
    prepared = prepare(config, Splits(images, images.take(slice(0)), images, "random images", 10))
    state = prepared.initial_state(0)
    state["step"] = state["step"] + prepared.steps_per_epoch
    phase = int(prepared.phases[prepared.steps_per_epoch])
    batch = Feed(images, case.batch_size, (0,), batch_sharding(prepared.mesh))(0)
    lowered = prepared.train_steps((0,))[phase].lower(state, *batch)
    return lowered, lowered.compile(), jax.block_until_ready((state, *batch))


def measure(case: Case, mesh: dict[str, int], repeats: int) -> dict[str, Any]:
    """Measures this process's median step time, in seconds, and the program's collectives."""
    import jax

    from experiments.benchmarks.collectives import collectives, summary

    _, compiled, (state, *batch) = compiled_step(case, mesh)
    seconds = []
    for _ in range(repeats + 1):  # the first run is a warm-up
        began = time.perf_counter()
        state, metrics = compiled(state, *batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state["params"]))
    return {
        "seconds": statistics.median(seconds[1:]),
        "parameters": size,
        "collectives": summary(collectives(compiled.as_text())),
    }


def measured_alone(
    name: str, mesh: str, processes: int, devices: int, repeats: int
) -> dict[str, Any]:
    """Runs `measure` in processes of its own; returns the result of process 0.

    Raises:
      ExperimentError: if the processes fail.
    """
    command = [sys.executable, str(_LAUNCHER), f"--processes={processes}", f"--devices={devices}"]
    command += ["--", "python", "-m", "experiments.benchmarks.scaling", "--one", name]
    command += ["--mesh", mesh, f"--repeats={repeats}"]
    group = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    reports = [line[4:] for line in group.stdout.splitlines() if line.startswith("[0] {")]
    if group.returncode or not reports:
        last = (group.stderr.strip().splitlines() or ["no output"])[-1]
        raise ExperimentError(f"{name} on {processes} x {devices} devices failed: {last}")
    return json.loads(reports[-1])


def floors(machine: Machine, flops: float, moved: float, parameters: float) -> dict[str, float]:
    """Computes the least seconds of a step for products, memory and the gradients' all-reduce.

    Args:
      machine: the machine; every chip has a batch of its own.
      flops, moved: operations and bytes of memory traffic of one chip's step.
      parameters: bytes of the parameters; an all-reduce sends each of them twice, except for the
        chip's own part.
    """
    return {
        "products": flops / machine.flops,
        "memory": moved / machine.memory,
        "all-reduce": 2 * parameters * (machine.chips - 1) / machine.chips / machine.links,
    }


def _print_measured(names: list[str], meshes: list[str], repeats: int) -> None:
    for name in names:
        case = CASES[name]
        for mesh in meshes:
            print(f"{case.net}, {name}, batch {case.batch_size} in all, divided over {mesh}")
            first = None
            for processes, devices in LAYOUTS:
                report = measured_alone(name, mesh, processes, devices, repeats)
                first = first or report["seconds"]
                sent = ", ".join(
                    f"{count} {kind} of {size:,} bytes"
                    for kind, (count, size) in sorted(report["collectives"].items())
                )
                print(
                    f"  {processes} x {devices} devices  {1e3 * report['seconds']:8.1f} ms"
                    f"  {report['seconds'] / first:5.2f}x  {sent or 'nothing sent'}",
                    flush=True,
                )
            print(f"  parameters: {report['parameters']:,} bytes", flush=True)


def _print_estimates() -> None:
    import jax

    for name, case in ESTIMATED.items():
        lowered, compiled, (state, *_) = compiled_step(case, {"data": 1})
        flops = lowered.cost_analysis()["flops"]
        moved = compiled.cost_analysis()["bytes accessed"]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state["params"]))
        print(
            f"{case.net}, {name}, batch {case.batch_size} on every chip: {flops / 1e9:.0f} GFLOP, "
            f"{moved / 1e9:.1f} GB of memory traffic, {size / 1e6:.0f} MB of parameters"
        )
        for machine_name, machine in MACHINES.items():
            times = floors(machine, flops, moved, size)
            # The all-reduce can overlap with the backward pass; at worst it follows it.
            step = max(times["products"], times["memory"])
            rate = machine.chips * case.batch_size / (step + times["all-reduce"])
            each = ", ".join(f"{what} {1e3 * value:.2f} ms" for what, value in times.items())
            print(
                f"  {machine_name}: {each}; step {1e3 * step:.2f} to "
                f"{1e3 * (step + times['all-reduce']):.2f} ms, "
                f"{rate:,.0f} images/s at these limits",
                flush=True,
            )


def main() -> None:
    """Reads the flags, then measures and estimates; with `--one` measures as one process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--meshes", nargs="+", choices=MESHES, default=["data"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--estimates", action="store_true", help="nothing else")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--mesh", choices=MESHES, default="data", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        from experiments.cluster import distributed

        with distributed.joined(process_group.from_flags()):
            print(json.dumps(measure(CASES[flags.one], MESHES[flags.mesh], flags.repeats)))
        return
    from experiments.benchmarks import timing

    print(timing.machine())
    try:
        if not flags.estimates:
            _print_measured(flags.cases, flags.meshes, flags.repeats)
        _print_estimates()
    except ExperimentError as error:
        fail(error)


if __name__ == "__main__":
    main()
