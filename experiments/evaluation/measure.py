"""Standard, PGD and verified error of a network, example by example, in parts that can go on.

Every batch, of the clean pass, the attacks and `boundjax.certify`, is divided between the local
devices. Several processes share the images (`experiments.evaluation.shards`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import boundjax as bj
from boundjax.certification.presets import BEST, METHODS, default_batch
from experiments.evaluation.certificates import ATTACK, Certificates, check_consistency
from experiments.evaluation.network import Network, Problem
from experiments.settings.config import EvaluationConfig
from experiments.settings.errors import ExperimentError, one_line

_KNOWN = (*METHODS, BEST)
# One call of `certify` computes so many of its own batches: it costs some time by itself, and what
# it computes is lost when it is killed.
_BATCHES = 4
# Between the devices that worked on a part one after the other.
_AND_THEN = ", then "


class Plan(NamedTuple):
    """How it is evaluated.

    Attributes:
      seed: of the random starts.
      cascade: all methods but the cheapest are run only on examples that resist the attacks and
        that no other method has verified.
      made_with: recorded for every part. What was begun with other packages or another kind of
        device is done again; how many devices there are may change.
    """

    seed: int = 0
    cascade: bool = False
    made_with: Mapping[str, Any] = {}


class Block(NamedTuple):
    """Images that are attacked together, from starts that depend on the block's number."""

    number: int
    rows: np.ndarray


def complete(
    found: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    plan: Plan = Plan(),  # noqa: B008 - a tuple
    save: Callable[[Certificates], None] = lambda found: None,
) -> None:
    """Computes what is missing in `found`: the attacks on its losses and `config.methods`.

    Args:
      found: filled in place.
      problem: what is evaluated, the same as before if `found` was begun before.
      config: methods, attack steps and restarts, batch size.
      plan: how.
      save: called after every batch.

    Raises:
      ExperimentError: for an empty data set, or a method that is unknown or cannot bound the model.
      RuntimeError: if standard error <= PGD error <= verified error fails for an example, which
        means that a bound is wrong.
    """
    network = Network(problem, config)
    begin(found, problem, config, plan)
    if not found.attacked.any():
        began = time.monotonic()
        found.know_correct(network.correct(problem.data))
        found.parts[ATTACK]["seconds"] += time.monotonic() - began
    blocks = attack_blocks(found.correct, network.size)
    finish(found, problem, config, plan, network, blocks, save)


def begin(found: Certificates, problem: Problem, config: EvaluationConfig, plan: Plan) -> None:
    """Checks what is asked for; forgets parts that cannot go on (`Plan.made_with`).

    Raises:
      ExperimentError: for an empty data set, or an unknown method.
    """
    if len(problem.data) == 0:
        raise ExperimentError("cannot evaluate on no images; set data.validation > 0")
    check_methods(config.methods)
    _begin(found, ATTACK, found.attacked, plan)
    begun = [name for name in cheapest_first(config.methods) if name in found.run_by]
    # In a cascade, what one method forgets may be due for another: so often, and it is settled.
    for name in begun * len(begun):
        # Before its attack nobody knows whether a cascade leaves an example out.
        due = _due(found, name, config, plan) | ~found.attacked
        _begin(found, name, found.run_by[name], plan, due)


def attack_blocks(correct: np.ndarray, size: int) -> list[Block]:
    """The batches of the attack: `size` each of the images that are `correct` `[N]`."""
    rows = np.flatnonzero(correct)
    starts = range(0, len(rows), size)
    return [Block(number, rows[start : start + size]) for number, start in enumerate(starts)]


def finish(
    found: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    plan: Plan,
    network: Network,
    blocks: Sequence[Block],
    save: Callable[[Certificates], None],
) -> None:
    """What follows when it is known which images are correct; arguments as of `complete`.

    Args:
      network: of the problem.
      blocks: the correct images.

    Raises:
      ExperimentError, RuntimeError: as `complete`.
    """
    _attack(found, problem, plan, network, blocks, save)
    check_consistency(found.evaluation, found.index)
    for name in cheapest_first(config.methods):
        _certify(found, problem, config, name, plan, save)
        check_consistency(found.evaluation, found.index)


def cheapest_first(methods: Sequence[str]) -> list[str]:
    """The methods of `boundjax.certify` in the order in which they are run."""
    return sorted(methods, key=lambda name: (-default_batch(name), _KNOWN.index(name)))


def check_methods(methods: Sequence[str]) -> None:
    """Raises an ExperimentError for a name that is not a method of `boundjax.certify`."""
    for name in methods:
        if name not in _KNOWN:
            raise ExperimentError(f"unknown method {name!r}: use {', '.join(_KNOWN)}")


# --------------------------------------------------------------------------- the two parts


def _attack(
    found: Certificates,
    problem: Problem,
    plan: Plan,
    network: Network,
    blocks: Sequence[Block],
    save: Callable[[Certificates], None],
) -> None:
    """The attack on every loss, of what is not attacked yet."""
    part = _begin(found, ATTACK, found.attacked, plan)
    losses = tuple(found.resisted_by)
    key = jax.random.key(plan.seed)
    for number, rows in blocks:
        if found.attacked[rows].all():
            continue
        began = time.monotonic()
        # By the number of the block: whoever attacks it starts at the same points.
        resisted = network.resisted(
            problem.data.take(rows), losses, jax.random.fold_in(key, number)
        )
        for loss, flags in zip(losses, resisted, strict=True):
            found.resisted_by[loss][rows] = flags
        found.attacked[rows] = True
        part["seconds"] += time.monotonic() - began
        save(found)


def _due(found: Certificates, name: str, config: EvaluationConfig, plan: Plan) -> np.ndarray:
    """On which examples a method is run, as far as is known, bool `[N]`."""
    due = np.ones(len(found.labels), bool)
    if plan.cascade and name != cheapest_first(config.methods)[0]:
        evaluation = found.evaluation
        due &= evaluation.resisted
        for other, flags in evaluation.verified_by.items():
            if other != name:
                due &= ~flags
    return due


def _certify(
    found: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    name: str,
    plan: Plan,
    save: Callable[[Certificates], None],
) -> None:
    """One method on the examples that it was not run on yet."""
    data = problem.data
    if name not in found.run_by:
        found.add_method(name, problem.num_classes)
    due = _due(found, name, config, plan)
    part = _begin(found, name, found.run_by[name], plan, due)
    pending = np.flatnonzero(due & ~found.run_by[name])
    if not pending.size:
        return
    devices = jax.local_devices()
    # All calls have one shape, and are compiled once; equal ones need the least filling up.
    most = min(config.batch_size, _BATCHES * default_batch(name) * len(devices))
    calls = -(-len(pending) // most)
    size = -(-len(pending) // calls)
    for start in range(0, len(pending), size):
        began = time.monotonic()
        rows = pending[start : start + size]
        padded = np.resize(rows, size)
        try:
            certificate = bj.certify(
                problem.model,
                data.images[padded],
                problem.threat.eps,
                labels=data.labels[padded],
                norm=problem.threat.norm,
                clip=problem.threat.clip,
                method=name,
                devices=devices,
            )
        except (bj.UnsupportedOpError, ValueError, TypeError, MemoryError) as error:
            raise ExperimentError(
                f"method {name!r} cannot bound this network: {one_line(error)}"
            ) from error
        found.margins_by[name][rows] = certificate.margins[: len(rows)]
        found.verified_by[name][rows] = certificate.verified[: len(rows)]
        found.run_by[name][rows] = True
        part["arithmetic"] = certificate.arithmetic
        part["dtype"] = str(certificate.margins.dtype)
        part["seconds"] += time.monotonic() - began
        save(found)


def _begin(
    found: Certificates,
    name: str,
    done: np.ndarray,
    plan: Plan,
    due: np.ndarray | None = None,
) -> dict[str, Any]:
    """The record of a part; one that was begun with other packages or devices begins anew."""
    made_with = plan.made_with
    part = found.parts.setdefault(name, {**made_with, "seconds": 0.0})
    if done.all() or (due is not None and not (due & ~done).any()):
        return part
    if {key: _kind(key, part.get(key)) for key in made_with} != {
        key: _kind(key, value) for key, value in made_with.items()
    }:
        done[:] = False
        if name in found.verified_by:
            found.verified_by[name][:] = False
            found.margins_by[name][:] = np.nan
        part |= {**made_with, "seconds": 0.0}
    elif "device" in made_with and made_with["device"] not in part["device"].split(_AND_THEN):
        part["device"] += _AND_THEN + made_with["device"]
    return part


def _kind(key: str, value: Any) -> Any:
    """Of devices, what they are: `2 x cpu` and `8 x cpu in 2 processes` go on with each other."""
    if key != "device" or not isinstance(value, str):
        return value
    first = value.split(_AND_THEN)[0]
    return re.sub(r"^\d+ x | in \d+ processes$", "", first)
