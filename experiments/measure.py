"""Standard, PGD and verified error of a network, example by example, in parts that can go on.

Batches of the clean pass and of the attacks are divided between the local devices;
`boundjax.certify` runs on one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import boundjax as bj
from boundjax.attacks import Descent
from boundjax.methods import BEST, METHODS, default_batch
from experiments.certificates import (
    ATTACK,
    Certificates,
    Evaluation,
    check_consistency,
    nothing_found,
)
from experiments.config import EvaluationConfig
from experiments.data import Images
from experiments.errors import ExperimentError

_KNOWN = (*METHODS, BEST)
# One call of `certify` computes so many of its own batches: it costs some time by itself, and what
# it computes is lost when it is killed.
_BATCHES = 4


class Problem(NamedTuple):
    """What is evaluated: an eval-mode `model` on all of `data` in balls of radius `eps`."""

    model: nn.Module
    variables: Any
    data: Images
    eps: float
    norm: float
    clip: tuple[float, float] | None


def evaluate(
    model: nn.Module,
    variables: Any,
    data: Images,
    eps: float,
    *,
    norm: float = jnp.inf,
    clip: tuple[float, float] | None,
    config: EvaluationConfig,
    seed: int = 0,
) -> Evaluation:
    """Evaluates the eval-mode `model` on all of `data` in the ball of radius `eps` in `norm`.

    Raises:
      ExperimentError: for an empty data set, or a method that is unknown or cannot bound the model.
      RuntimeError: if standard error <= PGD error <= verified error fails for an example, which
        means that a bound is wrong.
    """
    found = nothing_found(data.labels, (config.pgd_loss,), settings={})
    problem = Problem(model, variables, data, eps, norm, clip)
    complete(found, problem, config, seed=seed)
    in_order = {name: found.verified_by[name] for name in config.methods}
    return found.evaluation._replace(verified_by=in_order)


def complete(
    found: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    *,
    seed: int = 0,
    cascade: bool = False,
    made_with: dict[str, Any] | None = None,
    save: Callable[[Certificates], None] = lambda found: None,
) -> None:
    """Computes what is missing in `found`: the attacks on its losses and `config.methods`.

    Args:
      found: filled in place.
      problem: what is evaluated, the same as before if `found` was begun before.
      config: methods, attack steps and restarts, batch size.
      seed: of the random starts.
      cascade: all methods but the cheapest are run only on examples that resist the attacks and
        that no other method has verified.
      made_with: recorded for every part. What was begun with anything else is done again: one part
        is the work of one set of packages and devices.
      save: called after every batch.

    Raises:
      ExperimentError, RuntimeError: as `evaluate`.
    """
    if len(problem.data) == 0:
        raise ExperimentError("cannot evaluate on no images; set data.validation > 0")
    check_methods(config.methods)
    made_with = made_with or {}
    _attack(found, problem, config, seed, made_with, save)
    check_consistency(found.evaluation)
    cheapest, *others = cheapest_first(config.methods)
    for name in (cheapest, *others):
        _certify(found, problem, config, name, cascade and name in others, made_with, save)
        check_consistency(found.evaluation)


def cheapest_first(methods: Sequence[str]) -> list[str]:
    """The methods of `boundjax.certify` in the order in which they are run."""
    return sorted(methods, key=lambda name: (-default_batch(name), _KNOWN.index(name)))


def check_methods(methods: Sequence[str]) -> None:
    """Raises an ExperimentError for a name that is not a method of `boundjax.certify`."""
    for name in methods:
        if name not in _KNOWN:
            raise ExperimentError(f"unknown method {name!r}: use {', '.join(_KNOWN)}")


def verified(
    model: nn.Module,
    variables: Any,
    data: Images,
    eps: float,
    *,
    norm: float = jnp.inf,
    clip: tuple[float, float] | None,
    method: str,
    batch_size: int,
) -> np.ndarray:
    """Which examples `boundjax.certify` verifies for their true label, bool `[N]`."""
    certificate = bj.certify(
        (model, variables),
        jnp.asarray(data.images),
        eps,
        labels=jnp.asarray(data.labels),
        norm=norm,
        clip=clip,
        method=method,
        batch_size=batch_size,
    )
    return np.asarray(certificate.verified)


# --------------------------------------------------------------------------- the two parts


def _attack(
    found: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    seed: int,
    made_with: dict[str, Any],
    save: Callable[[Certificates], None],
) -> None:
    """The clean pass and the attack on every loss."""
    model, data = problem.model, problem.data
    part = _begin(found, ATTACK, found.attacked, made_with)
    if found.attacked.all():
        return
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    variables = jax.device_put(problem.variables, NamedSharding(mesh, PartitionSpec()))
    losses = tuple(found.resisted_by)
    size = min(config.batch_size, len(data))

    # Compiled once: the variables and the images are arguments, all batches have one shape. What
    # counts is computed as bounds are: with the shorter factors that accelerators take by default,
    # an example might look misclassified that is verified. The attack may take them on its way.
    @jax.jit
    @jax.default_matmul_precision("highest")
    def predict(variables, images):
        return model.apply(variables, images)

    def part_of(loss: str, name: str) -> Callable[..., Any]:
        """A part of the attack, compiled: its loops are Python's, see `Descent`."""

        @jax.jit
        @jax.default_matmul_precision("high")
        def part(variables, images, labels, *arguments):
            descent = Descent(
                lambda x: model.apply(variables, x),
                images,
                labels,
                problem.eps,
                problem.norm,
                problem.clip,
                loss=loss,
            )
            return getattr(descent, name)(*arguments)

        return part

    parts = {
        loss: {name: part_of(loss, name) for name in ("nothing", "start", "step", "end")}
        for loss in losses
    }

    def attack(loss: str, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        of = {
            name: functools.partial(part, variables, images, labels)
            for name, part in parts[loss].items()
        }
        best = of["nothing"]()
        for restart in range(config.pgd_restarts):
            iterate = of["start"](key, restart)
            for _ in range(config.pgd_steps):
                iterate, best = of["step"](iterate, best)
            best = of["end"](iterate, best)
        return best.iterate

    def batches(chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Which images, and these filled up to a shape that the devices divide."""
        for start in range(0, len(chosen), size):
            rows = chosen[start : start + size]
            yield rows, np.resize(rows, -(-size // len(devices)) * len(devices))

    began = time.monotonic()
    for rows, padded in batches(np.arange(len(data))):
        logits = predict(variables, jax.device_put(data.images[padded], sharded))
        found.correct[rows] = _strictly_correct(logits, data.labels[padded])[: len(rows)]
    # The centre is a point of the ball as well: what is wrong there needs no attack.
    found.attacked[~found.correct] = True
    key = jax.random.key(seed)
    for index, (rows, padded) in enumerate(batches(np.flatnonzero(found.correct))):
        if found.attacked[rows].all():
            continue
        images, labels = jax.device_put(tuple(data.take(padded)), sharded)
        for loss in losses:
            point = attack(loss, images, labels, jax.random.fold_in(key, index))
            resisted = _strictly_correct(predict(variables, point), data.labels[padded])
            found.resisted_by[loss][rows] = resisted[: len(rows)]
        found.attacked[rows] = True
        part["seconds"] += time.monotonic() - began
        began = time.monotonic()
        save(found)


def _certify(
    found: Certificates,
    problem: Problem,
    config: EvaluationConfig,
    name: str,
    cascade: bool,
    made_with: dict[str, Any],
    save: Callable[[Certificates], None],
) -> None:
    """One method on the examples that it was not run on yet."""
    data = problem.data
    if name not in found.run_by:
        found.run_by[name] = np.zeros(len(data), bool)
        found.verified_by[name] = np.zeros(len(data), bool)
        classes = jax.eval_shape(problem.model.apply, problem.variables, data.images[:1]).shape[-1]
        found.margins_by[name] = np.full((len(data), classes), np.nan, np.float32)
    due = np.ones(len(data), bool)
    if cascade:
        evaluation = found.evaluation
        due &= evaluation.resisted
        for other, flags in evaluation.verified_by.items():
            if other != name:
                due &= ~flags
    part = _begin(found, name, found.run_by[name], made_with, due)
    pending = np.flatnonzero(due & ~found.run_by[name])
    if not pending.size:
        return
    # All calls have one shape, and are compiled once; equal ones need the least filling up.
    calls = -(-len(pending) // min(config.batch_size, _BATCHES * default_batch(name)))
    size = -(-len(pending) // calls)
    for start in range(0, len(pending), size):
        began = time.monotonic()
        rows = pending[start : start + size]
        padded = np.resize(rows, size)
        try:
            certificate = bj.certify(
                (problem.model, problem.variables),
                data.images[padded],
                problem.eps,
                labels=data.labels[padded],
                norm=problem.norm,
                clip=problem.clip,
                method=name,
            )
        except (bj.UnsupportedOpError, ValueError, TypeError, MemoryError) as error:
            reason = " ".join(str(error).split())
            raise ExperimentError(f"method {name!r} cannot bound this network: {reason}") from error
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
    made_with: dict[str, Any],
    due: np.ndarray | None = None,
) -> dict[str, Any]:
    """The record of a part; one that was begun with other packages or devices begins anew."""
    part = found.parts.setdefault(name, {**made_with, "seconds": 0.0})
    differs = {key: part.get(key) for key in made_with} != made_with
    if differs and not done.all() and (due is None or (due & ~done).any()):
        done[:] = False
        if name in found.verified_by:
            found.verified_by[name][:] = False
            found.margins_by[name][:] = np.nan
        part |= {**made_with, "seconds": 0.0}
    return part


def _strictly_correct(logits: jax.Array, labels: np.ndarray) -> np.ndarray:
    """The true logit exceeds every other; a tie or a NaN is an error, as for a certificate."""
    logits = np.asarray(logits)
    own = np.take_along_axis(logits, labels[:, None], axis=-1)
    others = np.arange(logits.shape[-1])[None] != labels[:, None]
    return np.all((own > logits) | ~others, axis=-1)
