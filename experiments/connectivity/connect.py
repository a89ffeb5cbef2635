"""Connects two trained networks by a curve, measures losses along it, and looks for barriers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.diagnostics import barrier, bezier
from experiments import data
from experiments.connectivity import ends as ends_of_runs
from experiments.connectivity.curve import control_of, middle, prepare_curve, train_curve
from experiments.connectivity.ends import Ends
from experiments.connectivity.points import METHOD_OF, Measurement, batch_size
from experiments.data import Splits
from experiments.evaluation.evaluate import images_sha256, parameters_sha256
from experiments.methods.method import PyTree
from experiments.plots.connectivity import plot_connectivity
from experiments.records.connection import LOSSES, PATHS, Connection, ConnectionRecords
from experiments.records.printing import print_table
from experiments.records.versions import versions
from experiments.settings import radius
from experiments.settings.config import (
    CheckpointConfig,
    Config,
    OptimConfig,
    RobustConfig,
    TrainConfig,
)
from experiments.settings.errors import ExperimentError
from experiments.train.batch_norm import statistics_over
from experiments.train.prepare import Prepared, prepare


class Options(NamedTuple):
    """How to connect two runs; None takes the setting of the first."""

    loss: str = "interval"  # one of `LOSSES`, to train the curve on
    out: Path | None = None  # the folder; None: runs/A-B-LOSS
    eps: float | None = None  # None: `robust.eps_train`, which must be the same in both
    epochs: int = 50
    lr: float = 1e-3  # of Adam
    batch_size: int | None = None
    seed: int = 0
    points: int = 61  # positions t to measure at, with both ends
    train_count: int | None = None  # how many training images, from the first on; None: all
    count: int | None = None  # how many test images; None: all
    checkpoint_every: int = 200  # steps
    data_dir: str | None = None


def connect(run_a: Path, run_b: Path, options: Options) -> Connection:
    """Trains a curve between the networks of two runs and measures the losses along it.

    An earlier call that was stopped is resumed. The straight segment between the networks is
    measured as well.

    Args:
      run_a: the run folder of the network at `t = 0`.
      run_b: that of the network at `t = 1`.
      options: how to train and to measure.

    Raises:
      ExperimentError: for anything that the user can correct.
    """
    _check_options(options)
    ends = ends_of_runs.load(run_a, run_b, options.data_dir)
    config = _config(ends, options, (run_a, run_b))
    splits = _first_images(data.load(config.data), options)
    radius.check("--eps", config.robust.eps_train, config.robust.norm, splits.shape, splits.title)
    prepared = prepare_curve(prepare(config, splits))
    out = options.out or Path("runs") / f"{run_a.name}-{run_b.name}-{options.loss}"
    records = ConnectionRecords(out, config, _settings(ends, splits))
    records.create()
    print(
        f"curve from {run_a} to {run_b}, both {config.model.name} ({prepared.parameters:,} "
        f"parameters), on the {options.loss} loss at {config.robust.norm_label} eps "
        f"{config.robust.eps_train:.6g}: {prepared.total_steps:,} steps of "
        f"{config.train.batch_size} of {len(splits.train):,} images of {splits.title}, on "
        f"{prepared.devices}; folder {out}",
        flush=True,
    )
    start, end = (run.variables["params"] for run in ends)
    member = train_curve(prepared, start, end, records.training)
    controls = {"curve": control_of(member), "segment": middle(start, end)}
    began = time.monotonic()
    positions = [index / (options.points - 1) for index in range(options.points)]
    points = _measure(prepared, ends, controls, positions, records)
    result = {
        "runs": [str(run_a), str(run_b)],
        "methods": [run.config.robust.method for run in ends],
        "trained_on": options.loss,
        "model": config.model.name,
        "data": splits.title,
        "eps": config.robust.eps_train,
        "norm": config.robust.norm,
        "clip": config.robust.clip,
        "t": positions,
        "barriers": {path: _barriers(points[path]) for path in PATHS},
        "train_seconds": round(member.seconds, 1),
        "evaluation_seconds": round(time.monotonic() - began, 1),
        "device": prepared.devices,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    records.write_result(result)
    connection = Connection(result, points)
    plot_connectivity([connection], out / "connectivity.png")
    _print(connection, out)
    return connection


def _check_options(options: Options) -> None:
    if options.loss not in LOSSES:
        raise ExperimentError(f"--loss must be {' or '.join(LOSSES)}, got {options.loss!r}")
    for flag, number, minimum in (
        ("--epochs", options.epochs, 1),
        ("--batch-size", options.batch_size, 1),
        ("--points", options.points, 2),
        ("--train-count", options.train_count, 1),
        ("--count", options.count, 2),
        ("--checkpoint-every", options.checkpoint_every, 1),
    ):
        if number is not None and number < minimum:
            raise ExperimentError(f"{flag} must be >= {minimum}, got {number}")
    if not 0 < options.lr < np.inf:
        raise ExperimentError(f"--lr must be positive, got {options.lr}")
    if not 0 <= options.seed < 2**31:
        raise ExperimentError(f"--seed must be in [0, 2**31), got {options.seed}")


def _config(ends: Ends, options: Options, folders: tuple[Path, Path]) -> Config:
    """Returns the configuration of the training of the curve, on the data of the first run."""
    first, second = ends.start.config, ends.end.config
    eps = options.eps
    if eps is None:
        eps = first.robust.eps_train
        if second.robust.eps_train != eps:
            raise ExperimentError(
                f"the runs were trained at the radii {eps:g} ({folders[0]}) and "
                f"{second.robust.eps_train:g} ({folders[1]}); choose one with --eps"
            )
    if eps == 0:
        raise ExperimentError("--eps must be positive, got 0: a certified loss needs a radius")
    return Config(
        seed=options.seed,
        data=first.data,
        model=first.model,
        augment=first.augment,
        train=TrainConfig(
            epochs=options.epochs,
            batch_size=options.batch_size or first.train.batch_size,
            precision=first.train.precision,
        ),
        optim=OptimConfig(name="adam", lr=options.lr),
        robust=RobustConfig(
            method=METHOD_OF[options.loss],
            norm=first.robust.norm,
            eps_train=eps,
            eps_test=eps,
            ramp_epochs=0.0,
            kappa=(0.0, 0.0),
            beta=(1.0, 1.0),
            clip=first.robust.clip,
        ),
        checkpoint=CheckpointConfig(every=options.checkpoint_every),
    )


def _first_images(splits: Splits, options: Options) -> Splits:
    """Returns the images to train and to measure on; none are held out for a selection."""
    if len(splits.test) < 2:
        raise ExperimentError(f"{splits.title} needs two test images, got {len(splits.test)}")
    return splits._replace(
        train=splits.train.take(slice(options.train_count)),
        validation=splits.validation.take(slice(0)),
        test=splits.test.take(slice(options.count)),
    )


def _settings(ends: Ends, splits: Splits) -> dict[str, Any]:
    """Returns what decides the results, beside the configuration and the positions."""
    return {
        "parameters_sha256": [parameters_sha256(run.variables["params"]) for run in ends],
        "images_sha256": images_sha256(splits.test),
        "train_images": len(splits.train),
        "test_images": len(splits.test),
        "batch_size": batch_size(len(splits.test)),
    }


def _measure(
    prepared: Prepared,
    ends: Ends,
    controls: dict[str, Any],
    positions: list[float],
    records: ConnectionRecords,
) -> dict[str, list[dict[str, Any]]]:
    """Returns the points of every path, and measures those that are not recorded yet."""
    splits = prepared.splits
    start, end = (run.variables for run in ends)
    measure = Measurement(prepared, splits.test)
    statistics = None
    if "batch_stats" in start:
        statistics = statistics_over(prepared.model, splits.train.images)
    at = jax.jit(bezier)

    def measured(control: PyTree, t: float) -> dict[str, Any]:
        variables = {"params": at(jnp.float32(t), start["params"], control, end["params"])}
        if statistics is not None:
            # The layout is that of any network; its values are replaced.
            layout = {**variables, "batch_stats": start["batch_stats"]}
            variables["batch_stats"] = statistics(layout)
        return measure(variables)

    points: dict[str, list[dict[str, Any]]] = {}
    for path, control in controls.items():
        recorded = records.points(path)
        # Both paths have the same ends.
        ends_of_curve = points["curve"][:1] + points["curve"][-1:] if points else []
        at_ends: dict[float, dict[str, Any]] = {point["t"]: point for point in ends_of_curve}
        missing = [t for t in positions if t not in recorded and t not in at_ends]
        if missing:
            print(
                f"measuring {len(missing)} network{'s' if len(missing) > 1 else ''} of the {path} "
                f"on {len(splits.test):,} images",
                flush=True,
            )
        for t in positions:
            if t not in recorded:
                values = at_ends[t] if t in at_ends else measured(control, t)
                recorded[t] = {**values, "path": path, "t": t}
                records.append_point(recorded[t])
        points[path] = [recorded[t] for t in positions]
    return points


def _barriers(points: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns, by loss, whether there is a barrier along a path, where and how high."""
    barriers = {}
    for name in LOSSES:
        losses = [point[name]["loss"] for point in points]
        decided = barrier(
            jnp.asarray(losses, jnp.float32),
            jnp.asarray([point[name]["spread"] for point in points], jnp.float32),
        )
        index = int(decided.index)
        barriers[name] = {
            "exists": bool(decided.exists),
            "height": float(decided.height),
            "spread": float(decided.spread),
            "t": points[index]["t"],
            "loss": losses[index],
            "ends": [losses[0], losses[-1]],
        }
    return barriers


def _print(connection: Connection, out: Path) -> None:
    """Prints the losses at the ends and at the highest points, and in one line the verdict."""
    result = connection.result
    rows = [
        [
            f"{path}, {name}",
            *(f"{loss:.4f}" for loss in (*each["ends"], each["loss"])),
            f"{each['t']:.3f}",
            f"{each['height']:.4f}",
            f"{each['spread']:.4f}",
            "yes" if each["exists"] else "no",
        ]
        for path in PATHS
        for name, each in result["barriers"][path].items()
    ]
    header = ["loss", "t = 0", "t = 1", "highest", "at t", "above both", "spread", "barrier"]
    print_table(f"losses along paths between {' and '.join(result['runs'])}", header, rows)
    print(f"files: {out}")
    print(verdict(result), flush=True)


def verdict(result: dict[str, Any]) -> str:
    """Says in one line whether the curve has a barrier under the loss that it was trained on."""
    name = result["trained_on"]
    peak = result["barriers"]["curve"][name]
    ends = " and ".join(f"{loss:.4f}" for loss in peak["ends"])
    there = f"at t = {peak['t']:.3f} it is {peak['loss']:.4f}, at the ends {ends}"
    spread = f"twice its spread over batches ({peak['spread']:.4f})"
    if peak["exists"]:
        text = f"{there}, so it rises above both by {peak['height']:.4f}, more than {spread}"
        return f"barrier under the {name} loss: {text}"
    if peak["height"] > 0:
        text = f"{there}, so it rises above both by {peak['height']:.4f}, no more than {spread}"
    else:
        text = f"nowhere along the curve is it above the ends, {ends}"
    return f"no barrier under the {name} loss: {text}"
