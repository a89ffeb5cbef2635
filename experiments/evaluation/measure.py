"""Measures standard, PGD and verified error example by example, in parts that can be resumed.

The local devices divide every batch: of the clean pass, the attacks and `boundjax.certify`.
Several processes share the images (`experiments.evaluation.shards`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

import boundjax as bj
from boundjax.certification.presets import Method, default_batch
from experiments.evaluation.certificate_checks import ARITHMETICS
from experiments.evaluation.certificates import ATTACK, Certificates, check_consistency
from experiments.evaluation.network import Network, Problem
from experiments.settings.config import EvaluationConfig
from experiments.settings.errors import ExperimentError, one_line

# The methods of `boundjax.certify` by name, in their usual order.
METHODS: Mapping[str, Method] = {name: name for name in get_args(Method)}
# Batches of `certify` per call: a call has a fixed cost, and a killed call loses all its results.
_BATCHES = 4
# Separates devices that worked on a part one after the other.
_AND_THEN = ", then "


class Plan(NamedTuple):
    """How to evaluate.

    Attributes:
      seed: of the random starts.
      cascade: runs every method but the cheapest only on examples that resist the attacks and
        that no other method has verified.
      made_with: packages and devices, recorded for every part. A part that was begun with other
        packages or another kind of device starts again; the number of devices may change.
      keep_points: called after every batch of the attack, before its results are saved, with the
        batch's number, the numbers of the images that do not resist, int `[K]`, and for each of
        them a misclassified point, float32 `[K, ...]`.
    """

    seed: int = 0
    cascade: bool = False
    made_with: Mapping[str, Any] = {}
    keep_points: Callable[[int, np.ndarray, np.ndarray], None] = lambda block, index, points: None


class Block(NamedTuple):
    """Images attacked together; their random starts depend on the block's number."""

    number: int
    rows: np.ndarray


def complete(
    results: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    plan: Plan = Plan(),  # noqa: B008 - a tuple
    save: Callable[[Certificates], None] = lambda results: None,
) -> None:
    """Computes what is missing in `results`: the attacks on its losses and `config.methods`.

    Args:
      results: filled in place.
      problem: what to evaluate; the same problem with which `results` was begun.
      config: methods, attack steps and restarts, batch size.
      plan: how to evaluate.
      save: called after every batch.

    Raises:
      ExperimentError: for an empty data set, or a method that is unknown or cannot bound the model.
      RuntimeError: if standard error <= PGD error <= verified error fails for an example, which
        means that a bound is wrong.
    """
    network = Network(problem, config)
    begin(results, problem, config, plan)
    if not results.attacked.any():
        began = time.monotonic()
        results.record_clean_pass(network.correct(problem.data))
        results.parts[ATTACK]["seconds"] += time.monotonic() - began
    blocks = attack_blocks(results.correct, network.size)
    finish(results, problem, config, plan, network, blocks, save)


def begin(results: Certificates, problem: Problem, config: EvaluationConfig, plan: Plan) -> None:
    """Checks the request, and resets parts that cannot be resumed (`Plan.made_with`).

    Raises:
      ExperimentError: for an empty data set, or an unknown method.
    """
    if len(problem.data) == 0:
        raise ExperimentError("there are no images to evaluate on; set data.validation > 0")
    check_methods(config.methods)
    _begin(results, ATTACK, results.attacked, plan)
    begun = [name for name in cheapest_first(config.methods) if name in results.run_by]
    # Repeat to a fixed point: in a cascade, resetting one method can make its examples due for
    # another. Each pass settles at least one method.
    for name in begun * len(begun):
        # An example without its attack counts as due: a cascade may or may not leave it out.
        due = _due(results, name, config, plan) | ~results.attacked
        _begin(results, name, results.run_by[name], plan, due)
        _set_timeout(results, name, due, config.timeout)


def attack_blocks(correct: np.ndarray, size: int) -> list[Block]:
    """Divides the images that are `correct` `[N]` into the attack's batches of `size`."""
    rows = np.flatnonzero(correct)
    starts = range(0, len(rows), size)
    return [Block(number, rows[start : start + size]) for number, start in enumerate(starts)]


def finish(
    results: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    plan: Plan,
    network: Network,
    blocks: Sequence[Block],
    save: Callable[[Certificates], None],
) -> None:
    """Runs the attacks and the methods after the clean pass; the rest is as in `complete`.

    Args:
      network: the network of `problem`.
      blocks: the correct images.

    Raises:
      ExperimentError, RuntimeError: as `complete`.
    """
    _attack(results, problem, plan, network, blocks, save)
    check_consistency(results.evaluation, results.index)
    for name in cheapest_first(config.methods):
        _certify(results, problem, config, name, plan, save)
        check_consistency(results.evaluation, results.index)


def cheapest_first(methods: Sequence[str]) -> list[str]:
    """Sorts methods of `boundjax.certify` into the order in which they are run."""
    return sorted(methods, key=lambda name: (-default_batch(name), list(METHODS).index(name)))


def check_methods(methods: Sequence[str]) -> None:
    """Raises an ExperimentError for a name that is not a method of `boundjax.certify`."""
    for name in methods:
        if name not in METHODS:
            raise ExperimentError(f"unknown method {name!r}: use {', '.join(METHODS)}")


# --------------------------------------------------------------------------- the two parts


def _attack(
    results: Certificates,
    problem: Problem,
    plan: Plan,
    network: Network,
    blocks: Sequence[Block],
    save: Callable[[Certificates], None],
) -> None:
    """Attacks every loss on the images that are not attacked yet."""
    part = _begin(results, ATTACK, results.attacked, plan)
    losses = tuple(results.resisted_by)
    key = jax.random.key(plan.seed)
    for number, rows in blocks:
        if results.attacked[rows].all():
            continue
        began = time.monotonic()
        # The key depends on the block only, so any process starts at the same points.
        resisted, points = network.resisted(
            problem.data.take(rows), losses, jax.random.fold_in(key, number)
        )
        for loss, flags in zip(losses, resisted, strict=True):
            results.resisted_by[loss][rows] = flags
        broken = ~np.logical_and.reduce(resisted)
        plan.keep_points(number, results.index[rows[broken]], points[broken])
        results.attacked[rows] = True
        part["seconds"] += time.monotonic() - began
        save(results)


def _due(results: Certificates, name: str, config: EvaluationConfig, plan: Plan) -> np.ndarray:
    """Marks the examples that a method must run on, given the results so far: bool `[N]`."""
    due = np.ones(len(results.labels), bool)
    if plan.cascade and name != cheapest_first(config.methods)[0]:
        evaluation = results.evaluation
        due &= evaluation.resisted
        for other, flags in evaluation.verified_by.items():
            if other != name:
                due &= ~flags
    return due


def _certify(
    results: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    name: str,
    plan: Plan,
    save: Callable[[Certificates], None],
) -> None:
    """Runs one method on the examples that it has not seen yet."""
    data = problem.data
    if name not in results.run_by:
        results.add_method(name, problem.num_classes)
    due = _due(results, name, config, plan)
    part = _begin(results, name, results.run_by[name], plan, due)
    _set_timeout(results, name, due, config.timeout)
    pending = np.flatnonzero(due & ~results.run_by[name])
    if not pending.size:
        return
    devices = jax.local_devices()
    # All calls share one shape and compile once; calls of equal size need the least padding.
    most = min(config.batch_size, _BATCHES * default_batch(name) * len(devices))
    if name in results.falsified_by:
        most = 1  # a search may take its whole time, which a killed call would lose
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
                method=METHODS[name],
                rounding=None if config.rounding == "auto" else config.rounding,
                devices=devices,
                timeout=config.timeout if name in results.falsified_by else None,
            )
        except (
            bj.UnsupportedOpError,
            bj.NoProofError,
            ValueError,
            TypeError,
            MemoryError,
        ) as error:
            raise ExperimentError(
                f"method {name!r} cannot bound this network: {one_line(error)}"
            ) from error
        results.margins_by[name][rows] = certificate.margins[: len(rows)]
        results.verified_by[name][rows] = certificate.verified[: len(rows)]
        if name in results.falsified_by:
            results.falsified_by[name][rows] = certificate.falsified[: len(rows)]
        results.run_by[name][rows] = True
        # Another setting, or another version, may have begun this part: the weaker one holds.
        arithmetics = (part.get("arithmetic", "float32"), certificate.arithmetic)
        part["arithmetic"] = min(arithmetics, key=ARITHMETICS.index)
        part["dtype"] = str(certificate.margins.dtype)
        part["seconds"] += time.monotonic() - began
        save(results)


def _set_timeout(results: Certificates, name: str, due: np.ndarray, timeout: float) -> None:
    """Records how long every undecided image was searched; a longer time searches them again."""
    if name not in results.falsified_by:
        return
    record, run = results.parts[name], results.run_by[name]
    if timeout > record.setdefault("timeout", timeout):
        results.reset(name, run & ~results.verified_by[name] & ~results.falsified_by[name])
        record["timeout"] = timeout
    elif (due & ~run).any():
        record["timeout"] = timeout


def _begin(
    results: Certificates,
    name: str,
    done: np.ndarray,
    plan: Plan,
    due: np.ndarray | None = None,
) -> dict[str, Any]:
    """Returns the record of a part; resets one begun with other packages or devices."""
    made_with = plan.made_with
    part = results.parts.setdefault(name, {**made_with, "seconds": 0.0})
    if done.all() or (due is not None and not (due & ~done).any()):
        return part
    if {key: _kind(key, part.get(key)) for key in made_with} != {
        key: _kind(key, value) for key, value in made_with.items()
    }:
        done[:] = False
        if name in results.verified_by:
            results.reset(name, np.ones(len(done), bool))
        part |= {**made_with, "seconds": 0.0}
    elif "device" in made_with and made_with["device"] not in part["device"].split(_AND_THEN):
        part["device"] += _AND_THEN + made_with["device"]
    return part


def _kind(key: str, value: Any) -> Any:
    """Reduces a device entry to its kind: `8 x cpu in 2 processes` may resume `2 x cpu`."""
    if key != "device" or not isinstance(value, str):
        return value
    first = value.split(_AND_THEN)[0]
    return re.sub(r"^\d+ x | in \d+ processes$", "", first)
