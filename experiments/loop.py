"""One run, from a configuration to `summary.json`. Reads from top to bottom.

Everything that depends on chance or time is a pure function of (seed, step): the initial
parameters, the order of the batches, what is random in a step, the radius and the weights. The
state holds everything else. A run that was killed therefore continues from its latest checkpoint to
bit-identical parameters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import boundjax as bj
import boundjax.methods
from experiments import data, methods, models
from experiments.augment import create_augmentation
from experiments.batch_norm import population_statistics
from experiments.checkpoints import Checkpoints
from experiments.config import Config
from experiments.errors import ExperimentError
from experiments.evaluate import evaluate, verified
from experiments.feed import Feed
from experiments.plots.curves import plot_curves
from experiments.report import Report
from experiments.run_folder import RunFolder
from experiments.summary import device_name, print_summary, versions
from experiments.train_step import (
    METRICS,
    create_learning_rate,
    create_optimizer,
    create_schedule,
    create_state,
    create_train_step,
)


def run(config: Config, workdir: Path, name: str) -> dict[str, Any]:
    """Trains and evaluates; resumes an interrupted run; of a finished one, repeats the summary.

    Args:
      config: the validated configuration.
      workdir: the run folder, created if need be.
      name: of the experiment, for the records.

    Returns:
      What `summary.json` holds.

    Raises:
      ExperimentError: for whatever the user can correct.
    """
    # ------------------------------------------------------------------ run folder
    folder = RunFolder(workdir, config)
    summary = folder.summary()
    if summary is not None:
        print(f"{workdir} holds a finished run ({summary['finished']}); nothing to do.")
        print_summary(summary, workdir)
        return summary

    certifying = (*boundjax.methods.METHODS, boundjax.methods.BEST)
    for method in (*config.evaluation.methods, config.evaluation.selection_method):
        if method not in certifying:  # said now, not after the training
            raise ExperimentError(
                f"config.evaluation: unknown method {method!r}: use {', '.join(certifying)}"
            )

    # ------------------------------------------------------------------ devices
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    replicated = NamedSharding(mesh, PartitionSpec())
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    batch_size = config.train.batch_size
    if batch_size % len(devices):
        raise ExperimentError(
            f"config.train.batch_size must be a multiple of the {len(devices)} devices, "
            f"got {batch_size}"
        )

    # ------------------------------------------------------------------ data
    splits = data.load(config.data)
    steps_per_epoch = len(splits.train) // batch_size
    if steps_per_epoch == 0:
        raise ExperimentError(
            f"config.train.batch_size must be at most the {len(splits.train)} training images, "
            f"got {batch_size}"
        )
    total_steps = config.train.epochs * steps_per_epoch

    # ------------------------------------------------------------------ model and train step
    model = models.from_config(config.model)
    image_shape = splits.train.images.shape[1:]
    method = methods.create(model, config)
    threat = methods.Setting(model, config).threat
    schedule = create_schedule(config.robust, steps_per_epoch)
    learning_rate = create_learning_rate(config.optim, steps_per_epoch)
    optimizer = create_optimizer(config.optim, steps_per_epoch)
    key = jax.random.key(config.seed)
    # One step per phase of the method (natural, interval, linear bounds), compiled when first due.
    train_steps = [
        jax.jit(
            create_train_step(
                model,
                objective,
                optimizer,
                schedule,
                steps_per_epoch,
                key,
                create_augmentation(**dataclasses.asdict(config.augment)),
            ),
            in_shardings=(replicated, sharded, sharded),
            out_shardings=replicated,
            donate_argnums=0,
        )
        for objective in method.objectives
    ]
    phases = np.asarray(
        jax.vmap(lambda step: method.phase(schedule(step)))(jnp.arange(total_steps))
    )
    feed = Feed(splits.train, batch_size, config.seed, mesh)
    try:
        state = jax.jit(
            lambda key: create_state(method, model, optimizer, image_shape, key),
            out_shardings=replicated,
        )(key)
        for phase in sorted(set(phases.tolist())):
            train_steps[phase].trace(state, *feed(0))  # said now, not in the middle of the training
    except (bj.UnsupportedOpError, NotImplementedError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ExperimentError(
            f"robust.method={config.robust.method!r} cannot train model {config.model.name!r}: "
            f"{reason}"
        ) from error
    selected = nothing_selected(state, selecting=len(splits.validation) > 0)

    report = Report(total_steps)
    report.line(
        f"{name}: {config.robust.method} training of {config.model.name} "
        f"({models.count_parameters(model, image_shape):,} parameters) "
        f"on {len(splits.train):,} images of {splits.title}, "
        f"{total_steps:,} steps of {batch_size}, on {device_name(devices)}; run folder {workdir}"
    )

    # ------------------------------------------------------------------ loop
    folder.create()  # not before all that can be wrong with the config has been said
    seconds_before = 0.0
    with Checkpoints(workdir, config) as checkpoints, report:
        restored = checkpoints.restore(state, selected)
        if restored is not None:
            state, selected, seconds_before = restored
            report.line(f"resumed after step {int(state['step']):,} of {total_steps:,}")
        first_step = int(state["step"])
        folder.drop_records_after(first_step)
        began = time.monotonic()

        def seconds() -> float:
            return seconds_before + time.monotonic() - began

        if restored is None:  # so that even a first step that diverges leaves one
            checkpoints.save(0, state, selected, 0.0)
        watch = Watch(steps_per_epoch, folder.path)
        for step in range(first_step, total_steps):
            state, metrics = train_steps[phases[step]](state, *feed(step))
            # Waits for the step before this one, so that the devices always have one to do.
            watch.see(step, metrics)
            done = step + 1
            if done % steps_per_epoch == 0:
                epoch = done // steps_per_epoch
                record = {"step": done, "epoch": epoch, "seconds": round(seconds(), 2)}
                weights = schedule(step)
                record |= {key: float(value) for key, value in weights._asdict().items()}
                record["lr"] = float(learning_rate(step))
                means = {key: float(state["metrics"][key]) / steps_per_epoch for key in METRICS}
                # The ReLUs' states are not known in every phase.
                record |= {key: value for key, value in means.items() if math.isfinite(value)}
                watch.finish()
                last_epoch = epoch == config.train.epochs
                if len(splits.validation) and (epoch % config.evaluation.every == 0 or last_epoch):
                    errors = _validate(config, model, state, splits, threat)
                    record |= {f"validation_{key}": value for key, value in errors.items()}
                    selected = _select(selected, state, epoch, errors)
                record["seconds"] = round(seconds(), 2)
                folder.append_record(record)
                report.line(_describe(record, config.train.epochs))
            if done % config.checkpoint.every == 0 or done == total_steps:
                watch.finish()  # no checkpoint of a step that diverged
                checkpoints.save(done, state, selected, seconds())
            report.update(done)
        train_seconds = seconds()

    # ------------------------------------------------------------------ test images
    print(
        f"evaluating on {len(splits.test):,} test images of {splits.title} "
        f"at {config.robust.norm_label} eps {config.robust.eps_test:.6g}"
    )
    began = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    candidates = {f"last epoch ({config.train.epochs})": state}
    if len(splits.validation):
        candidates = {f"selected epoch ({int(selected['epoch'])})": selected} | candidates
    for label, candidate in candidates.items():
        if len(splits.validation) and int(selected["epoch"]) == config.train.epochs and results:
            results[label] = dict(next(iter(results.values())))  # the last epoch was selected
            continue
        evaluation = evaluate(
            model,
            deployed(config, model, candidate, splits),
            splits.test,
            config.robust.eps_test,
            norm=threat.norm,
            clip=threat.clip,
            config=config.evaluation,
            seed=config.seed,
        )
        results[label] = evaluation.errors()

    # ------------------------------------------------------------------ summary
    records = folder.records()
    title = f"{name}: {config.robust.method}, {config.model.name}, {splits.title}"
    plot_curves(records, title, folder.curves, config.robust.norm_label)
    attack = config.evaluation
    summary = {
        "experiment": name,
        "results": results,
        "selection": (
            f"smallest verified error ({attack.selection_method}) on the last "
            f"{len(splits.validation)} training images, which were not trained on"
            if len(splits.validation)
            else "none: trained on all training images, the last epoch is reported"
        ),
        "eps_test": config.robust.eps_test,
        "eps_train": config.robust.eps_train,
        "norm": config.robust.norm,
        "clip": list(threat.clip) if threat.clip else None,
        "bounds": list(attack.methods),
        "attack": (
            f"PGD-{attack.pgd_steps}, {attack.pgd_restarts} start(s), {attack.pgd_loss} loss, "
            "best iterate"
        ),
        "method": config.robust.method,
        "model": config.model.name,
        "parameters": models.count_parameters(model, image_shape),
        "parameters_sha256": parameters_sha256(deployed(config, model, state, splits)),
        "data": splits.title,
        "train_images": len(splits.train),
        "validation_images": len(splits.validation),
        "test_images": len(splits.test),
        "epochs": config.train.epochs,
        "steps": total_steps,
        "seed": config.seed,
        "train_seconds": round(train_seconds, 1),
        "evaluation_seconds": round(time.monotonic() - began, 1),
        "device": device_name(devices),
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    folder.write_summary(summary)
    print_summary(summary, workdir)
    return summary


class Watch:
    """Reads the loss of every step, one step late, and stops a run that diverges."""

    def __init__(self, steps_per_epoch: int, workdir: Path):
        """Nothing seen yet."""
        self._steps_per_epoch, self._workdir = steps_per_epoch, workdir
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._last: dict[str, jax.Array] | None = None

    def see(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step, and looks at those of the step before.

        Raises:
          ExperimentError: if that step's loss is not finite.
        """
        self.finish()
        self._pending = step, metrics

    def finish(self) -> None:
        """Looks at the metrics of the latest step.

        Raises:
          ExperimentError: if its loss is not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss = float(metrics["loss"])
        if math.isfinite(loss):
            self._last = metrics
            return
        before = "it was the first step"
        if self._last is not None:
            last = {key: float(value) for key, value in self._last.items()}
            values = ", ".join(f"{key} {last[key]:.4g}" for key in last if math.isfinite(last[key]))
            before = f"the step before had {values}"
        raise ExperimentError(
            f"training diverged at step {step + 1} (epoch {step // self._steps_per_epoch + 1}, "
            f"loss {loss}); {before}; {self._workdir} keeps a checkpoint from before; lower "
            "config.optim.lr or set config.optim.clip_norm, with a new --workdir"
        )


def parameters_sha256(variables: Any) -> str:
    """SHA-256 over names, types, shapes and bytes of all leaves: equal if bit-identical."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def variables_of(state: dict[str, Any]) -> dict[str, Any]:
    """What the eval-mode model needs of a state, on the host."""
    variables = {"params": state["params"]}
    if state["batch_stats"]:
        variables["batch_stats"] = state["batch_stats"]
    return jax.device_get(variables)


def deployed(config: Config, model, state: dict[str, Any], splits: data.Splits) -> dict[str, Any]:
    """The variables that are evaluated: with `precise_bn`, with statistics of all images."""
    variables = variables_of(state)
    if config.evaluation.precise_bn and "batch_stats" in variables:
        statistics = population_statistics(model, variables, splits.train.images)
        variables["batch_stats"] = statistics
    return variables


def nothing_selected(state: dict[str, Any], selecting: bool) -> dict[str, Any]:
    """Same layout as a selection, so that both restore alike."""
    selected = {
        "epoch": jnp.int32(0),
        "verified_error": jnp.float32(jnp.inf),
        "standard_error": jnp.float32(jnp.inf),
    }
    if selecting:
        # Copies: the loop donates the originals.
        selected["params"] = jax.tree.map(jnp.copy, state["params"])
        selected["batch_stats"] = jax.tree.map(jnp.copy, state["batch_stats"])
    return selected


def _select(
    selected: dict[str, Any], state: dict[str, Any], epoch: int, errors: dict[str, float]
) -> dict[str, Any]:
    """The better by verified, then standard validation error; of equals the later one."""
    best = (float(selected["verified_error"]), float(selected["standard_error"]))
    if (errors["verified_error"], errors["standard_error"]) > best:
        return selected
    return {
        "epoch": jnp.int32(epoch),
        "verified_error": jnp.float32(errors["verified_error"]),
        "standard_error": jnp.float32(errors["standard_error"]),
        "params": jax.tree.map(jnp.copy, state["params"]),
        "batch_stats": jax.tree.map(jnp.copy, state["batch_stats"]),
    }


def _validate(config: Config, model, state, splits, threat) -> dict[str, float]:
    """Standard and verified error at eps_test on the validation images."""
    variables, validation = deployed(config, model, state, splits), splits.validation
    size = min(config.evaluation.batch_size, len(validation))
    flags = {
        key: verified(
            model,
            variables,
            validation,
            eps,
            norm=threat.norm,
            clip=threat.clip,
            method=config.evaluation.selection_method,
            batch_size=size,
        )
        for key, eps in (("standard_error", 0.0), ("verified_error", config.robust.eps_test))
    }
    return {key: float(1.0 - np.mean(value)) for key, value in flags.items()}


def _describe(record: dict[str, Any], epochs: int) -> str:
    text = (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  {record['seconds']:7.1f} s  "
        f"eps {record['eps']:.4f}  kappa {record['kappa']:.2f}  beta {record['beta']:.2f}  "
        f"loss {record['loss']:.4f}  "
        f"train error: standard {100 * record['standard_error']:5.2f} %, "
        f"verified {100 * record['verified_error']:5.2f} %"
    )
    if "validation_verified_error" in record:
        text += (
            f"  validation: standard {100 * record['validation_standard_error']:5.2f} %, "
            f"verified {100 * record['validation_verified_error']:5.2f} %"
        )
    return text
