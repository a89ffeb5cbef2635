"""Trains one run, or the runs of several seeds as one program."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cluster import distributed
from experiments.cluster.preemption import Preempted, preemption
from experiments.records.folder import Records
from experiments.records.printing import Report
from experiments.settings.errors import ExperimentError
from experiments.train.feed import Feed
from experiments.train.mesh import batch_sharding
from experiments.train.prepare import Prepared
from experiments.train.step import METRICS, State
from experiments.train.validation import validate
from experiments.train.variables import nothing_selected, select


@dataclass
class Member:
    """One run: its seed and records and, from `open_members` on, its state."""

    seed: int
    records: Records
    state: State = field(default_factory=dict)
    selected: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """How many steps the run has been trained for."""
        return int(self.state["step"])


def open_members(prepared: Prepared, members: Sequence[Member]) -> None:
    """Gives every run the state of its latest checkpoint or its initial state.

    Raises:
      ExperimentError: if a checkpoint is of another configuration, or a file cannot be read.
    """
    for member in members:
        state = prepared.initial_state(member.seed)
        selected = nothing_selected(state, selecting=len(prepared.splits.validation) > 0)
        member.state, member.selected, member.seconds = member.records.resume(state, selected)


def train(prepared: Prepared, members: Sequence[Member], report: Report) -> None:
    """Trains runs that are at the same step to their end, several as one `vmap`ped program.

    Raises:
      ExperimentError: if the loss or the network of a run is not finite.
      Preempted: after SIGTERM, with a checkpoint of the last step.
    """
    config, total = prepared.config, prepared.total_steps
    first = members[0].step
    if first == total:
        return
    seeds = tuple(member.seed for member in members)
    steps = prepared.train_steps(seeds)
    feed = Feed(
        prepared.splits.train,
        config.train.batch_size,
        seeds,
        batch_sharding(prepared.mesh, together=len(members) > 1),
    )
    watch = Watch(prepared.steps_per_epoch, members)
    joint = _JointState(prepared, members)
    with preemption.deferred(lambda calls: distributed.decided(calls, max)):
        for step in range(first, total):
            batch = feed(step)
            if prepared.diagnostics.due(step):
                watch.finish()  # what diverged is not worth a measure
                joint.measure(step, batch)
            joint.state, metrics = steps[prepared.phases[step]](joint.state, *batch)
            # This waits for the step before, so that the devices always have one to do.
            watch.see(step, metrics)
            done = step + 1
            stop = preemption.due()
            ends_epoch = done % prepared.steps_per_epoch == 0
            saves = done % config.checkpoint.every == 0 or done == total or stop
            if ends_epoch or saves:
                watch.finish()  # before anything is written: this step may have diverged
                joint.hand_out()
            if ends_epoch:
                for member in members:
                    text = _end_epoch(prepared, member, step)
                    report.line(f"seed {member.seed}  {text}" if len(members) > 1 else text)
            if saves:
                _save(members, done)
            report.update(done)
            if stop:
                raise Preempted(f"after step {done:,} of {total:,}")
        for member in members:
            member.records.wait()  # the runs that are trained next write checkpoints as well


class _JointState:
    """The state of runs that are trained as one program, and the time that they take.

    With several runs, every leaf has a leading axis with one entry per run.
    """

    def __init__(self, prepared: Prepared, members: Sequence[Member]):
        self._members, self._diagnostics = members, prepared.diagnostics
        self._seconds_before, self._began = members[0].seconds, time.monotonic()
        self.state = members[0].state
        self._take = None
        if len(members) > 1:
            stack = jax.jit(
                lambda *states: jax.tree.map(lambda *leaves: jnp.stack(leaves), *states),
                out_shardings=prepared.state_shardings(together=True),
            )
            self.state = stack(*(member.state for member in members))
            self._take = jax.jit(
                lambda state, index: jax.tree.map(lambda leaf: leaf[index], state),
                out_shardings=prepared.state_shardings(together=False),
            )

    def measure(self, step: int, batch: tuple[jax.Array, jax.Array]) -> None:
        """Records the diagnostics of every run, before the step changes the state."""
        for index, member in enumerate(self._members):
            state, (images, labels) = self._of(index), batch
            if self._take:
                images, labels = images[index], labels[index]
            measure = self._diagnostics.measure
            member.records.append_landscape(measure(step, member.seed, state, images, labels))

    def _of(self, index: int) -> State:
        return self._take(self.state, np.int32(index)) if self._take else self.state

    def hand_out(self) -> None:
        """Gives every run its part of the state and an equal share of the time."""
        for index, member in enumerate(self._members):
            elapsed = time.monotonic() - self._began
            member.seconds = self._seconds_before + elapsed / len(self._members)
            member.state = self._of(index)


class Watch:
    """Checks the metrics of every step, one step late, and stops runs that diverge."""

    def __init__(self, steps_per_epoch: int, members: Sequence[Member]):
        self._steps_per_epoch, self._members = steps_per_epoch, members
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._last: dict[str, jax.Array] | None = None

    def see(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step, and checks those of the step before.

        Raises:
          ExperimentError: if the loss of the step before, or the network after it, is not finite.
        """
        self.finish()
        self._pending = step, metrics

    def finish(self) -> None:
        """Checks the metrics of the latest step.

        Raises:
          ExperimentError: if its loss, or the network after it, is not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        losses, norms = np.atleast_1d(metrics["loss"]), np.atleast_1d(metrics["norm"])
        bad = np.flatnonzero(~(np.isfinite(losses) & np.isfinite(norms)))
        if not bad.size:
            self._last = metrics
            return
        member = self._members[bad[0]]
        before = "it was the first step" if step == 0 else "it was the first after a checkpoint"
        if self._last is not None:
            last = {key: np.atleast_1d(value)[bad[0]] for key, value in self._last.items()}
            finite = [f"{key} {value:.4g}" for key, value in last.items() if np.isfinite(value)]
            before = f"the step before had {', '.join(finite)}"
        raise ExperimentError(
            f"training diverged at step {step + 1} (epoch {step // self._steps_per_epoch + 1}, "
            f"loss {losses[bad[0]]}, norm of the network {norms[bad[0]]}); {before}; "
            f"{member.records.path} keeps a checkpoint from before; lower config.optim.lr or set "
            "config.optim.clip_norm, with a new run folder"
        )


def _end_epoch(prepared: Prepared, member: Member, step: int) -> str:
    """Selects, records and describes a run at the end of an epoch."""
    config, done = prepared.config, step + 1
    epoch = done // prepared.steps_per_epoch
    record = {"step": done, "epoch": epoch, "seconds": round(member.seconds, 2)}
    coefficients = prepared.schedule(step)
    record |= {key: float(value) for key, value in coefficients._asdict().items()}
    record["lr"] = np.asarray(prepared.learning_rate(step)).item()
    metrics = jax.device_get(member.state["metrics"])
    means = {key: float(metrics[key]) / prepared.steps_per_epoch for key in METRICS}
    # Phases without bounds give NaN for the fractions of ReLUs.
    record |= {key: value for key, value in means.items() if math.isfinite(value)}
    last = epoch == config.train.epochs
    if len(prepared.splits.validation) and (epoch % config.evaluation.every == 0 or last):
        errors = validate(prepared, member.state)
        record |= {f"validation_{key}": value for key, value in errors.items()}
        member.selected = select(member.selected, member.state, epoch, errors)
    member.records.append_metrics(record)
    return _describe(record, config.train.epochs)


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


def _save(members: Sequence[Member], step: int) -> None:
    """Starts writing a checkpoint of every run."""
    for member in members:
        member.records.save(step, member.state, member.selected, member.seconds)
        if len(members) > 1 and distributed.processes() > 1:
            member.records.wait()  # orbax's barriers cannot tell two writers apart
