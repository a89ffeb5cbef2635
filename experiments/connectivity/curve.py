"""Trains the control point of a quadratic Bezier curve on a certified loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.diagnostics import bezier
from experiments.methods import Batch, Coefficients, Method, Objective
from experiments.methods.method import Outcome, PyTree
from experiments.records.folder import Records
from experiments.records.printing import Report
from experiments.settings.config import RobustConfig
from experiments.train.loop import Member, train
from experiments.train.mesh import on_host, place
from experiments.train.prepare import Prepared
from experiments.train.variables import nothing_selected


def target(robust: RobustConfig) -> Coefficients:
    """The coefficients of the certified loss: the final radius, kappa 0 and beta 1."""
    return Coefficients(
        eps=jnp.float32(robust.eps_train),
        kappa=jnp.float32(0.0),
        beta=jnp.float32(1.0),
        ramp=jnp.float32(1.0),
    )


def on_curve(objective: Objective) -> Objective:
    """Returns the loss of a control point: that of one network of the curve, at a random `t`.

    The parameters of the result are the control point; its collections `start` and `end` are the
    parameters of the ends. `t` is uniform in `[0, 1]`, a function of the key. The gradient in the
    control point is `2 t (1 - t)` times that of the network (Garipov et al. 2018, section 3.3).
    """

    def loss(
        control: PyTree,
        collections: dict[str, PyTree],
        batch: Batch,
        coefficients: Coefficients,
        key: jax.Array,
    ) -> tuple[Any, Outcome]:
        position, rest = jax.random.split(key)
        ends = collections["start"], collections["end"]
        params = bezier(jax.random.uniform(position), ends[0], control, ends[1])
        return objective(params, collections, batch, coefficients, rest)

    return loss


def prepare_curve(prepared: Prepared) -> Prepared:
    """Replaces what a run trains by a curve between two networks, on the loss of its method."""
    coefficients = target(prepared.config.robust)
    phase = int(prepared.method.phase(coefficients))
    return dataclasses.replace(
        prepared,
        method=Method((on_curve(prepared.method.objectives[phase]),), lambda _: jnp.int32(0)),
        schedule=lambda step: coefficients,
        phases=np.zeros_like(prepared.phases),
    )


def middle(start: PyTree, end: PyTree) -> PyTree:
    """The control point of the straight segment."""
    return jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, start, end)


def train_curve(prepared: Prepared, start: PyTree, end: PyTree, records: Records) -> Member:
    """Trains a curve from the straight segment on, or resumes from its latest checkpoint.

    Args:
      prepared: the result of `prepare_curve`.
      start: the parameters at `t = 0`, on the host.
      end: the parameters at `t = 1`, on the host.
      records: the files of the training.

    Returns:
      The trained run; the parameters in its state are the control point.

    Raises:
      ExperimentError: if a checkpoint is of another configuration, or the training diverges.
      Preempted: after SIGTERM, with a checkpoint of the last step.
    """

    def placed(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: place(leaf, prepared.replicated), tree)

    member = Member(prepared.config.seed, records)
    state = prepared.initial_state(member.seed)
    state |= {"params": placed(middle(start, end)), "start": placed(start), "end": placed(end)}
    with records, Report(prepared.total_steps) as report:
        member.state, member.selected, member.seconds = records.resume(
            state, nothing_selected(state, selecting=False)
        )
        if member.step:
            report.line(f"resumed after step {member.step:,} of {prepared.total_steps:,}")
        train(prepared, [member], report)
    return member


def control_of(member: Member) -> PyTree:
    """The control point of a trained curve, on the host."""
    return on_host(member.state["params"])
