"""`certify(method="complete")`: bounds for the whole batch, then searches for what is open."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from boundjax.certification.applies import Apply, one_example, rows_of
from boundjax.certification.inputs import per_example
from boundjax.certification.presets import IN_COMPLETE, Method, default_batch
from boundjax.certification.progress import Steps
from boundjax.certification.request import Request, other_classes, verified_by
from boundjax.properties import Case, Property, predicts
from boundjax.search.limits import MAX_BYTES
from boundjax.search.programs import Programs
from boundjax.search.search import verify
from boundjax.sets import rounding
from boundjax.sets.threat import Threat
from boundjax.typing import Device, PyTree

DEFAULT_TIMEOUT = 60.0


class Answer(NamedTuple):
    """What is known of a batch.

    Attributes:
      verified: bool `[B]`.
      margins: `[B, C]`, see `Certificate`.
      counterexamples: by the index of the example, an input in its set that is misclassified.
    """

    verified: np.ndarray
    margins: np.ndarray
    counterexamples: dict[int, np.ndarray]


def answered(
    request: Request, threat: Threat, timeout: float, devices: Sequence[Device] | None
) -> Answer:
    """Decides every example, as far as the time suffices.

    Args:
      request: with the method `"complete"`.
      threat: as the user stated it: counterexamples lie in its exact sets.
      timeout: seconds for the search of one example, compilation not counted.
      devices: those that divide the domains of a search; None for the default device.
    """
    logits, labels = request.logits, request.labels
    label_logits = np.take_along_axis(logits, labels[:, None], axis=1)
    rivals = other_classes(labels, logits.shape[1])
    wrong = np.any(rivals & (logits >= label_logits), axis=1)
    correct = np.all(~rivals | (logits < label_logits), axis=1)  # neither if a logit is NaN
    counterexamples = {int(k): request.x[k] for k in np.flatnonzero(wrong)}
    margins = np.where(rivals, -np.inf, 0.0).astype(request.x.dtype)
    steps = Steps(request.progress, len(labels), len(labels))
    steps.close(np.flatnonzero(wrong))
    for method in IN_COMPLETE:
        still_open = np.flatnonzero(correct & ~verified_by(margins, labels))
        # The first method bounds all examples.
        rows = np.arange(len(labels)) if method == IN_COMPLETE[0] else still_open
        if len(rows):
            steps.add(len(rows) if method != IN_COMPLETE[0] else 0)
            margins[rows] = np.fmax(margins[rows], _bounded(request, rows, method, steps))
    # No bound is finite around a point whose logits are not.
    bounded = np.isfinite(logits).all(axis=1)
    pending = np.flatnonzero(correct & bounded & ~verified_by(margins, labels))
    if len(pending):
        steps.add(len(pending))
        search = _Searches(request, threat, timeout, devices)
        for k in pending:
            reached, point = search.decide(int(k))
            margins[k] = np.fmax(margins[k], reached)
            if point is not None:
                counterexamples[int(k)] = point
            steps.searched(int(k), point is not None or bool(verified_by(margins, labels)[k]))
    verified = verified_by(margins, labels) & correct
    verified[list(counterexamples)] = False
    return Answer(verified, margins, counterexamples)


def _bounded(request: Request, rows: np.ndarray, method: Method, steps: Steps) -> np.ndarray:
    """The margins of some examples, in full batches, so that one size is compiled."""
    size = min(request.batch_size or default_batch(method), len(request.labels))
    padded = request.of(np.resize(rows, -(-len(rows) // size) * size), method)
    return padded.run(padded.eps, steps.of(rows))[1][: len(rows)]


class _Searches:
    """Searches around the examples of a request, one after the other."""

    def __init__(
        self,
        request: Request,
        threat: Threat,
        timeout: float,
        devices: Sequence[Device] | None,
    ) -> None:
        self._request, self._timeout = request, timeout
        self._clip, self._exact_eps = threat.clip, per_example(np.asarray(threat.eps), request.x)
        self._max_bytes = min(MAX_BYTES, request.max_bytes or MAX_BYTES)
        self._devices = None if devices is None else tuple(devices)
        options = request.rounding, self._max_bytes, self._devices
        self._compiled = request.compiled(_empty, *options)
        self._programs: Programs | None = None

    def _programs_of(self, k: int) -> Programs:
        """The programs for an example; all examples share them unless they have constants."""
        request = self._request
        if self._programs is None or request.constants:
            # The constants of an example are weights of its network.
            constants = rows_of(request.constants, k)
            self._programs = Programs(
                _on_one_example(request.apply),
                request.x.shape[1:],
                rounding=request.rounding,
                max_bytes=self._max_bytes,
                devices=self._devices,
                weights=(request.variables, constants),
                compiled=self._compiled,
            )
        return self._programs

    def decide(self, k: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Proved lower bounds `[C]` on the margins of an example, and a counterexample or None."""
        request, x = self._request, self._request.x[k]
        ball = request.threat.within(_row(request.eps, k))(x)
        ends = ball.interval()
        outer = np.asarray(ends.lower), np.asarray(ends.upper)
        inner = rounding.inward_ends(x, _row(self._exact_eps, k), self._clip)
        label, classes = int(request.labels[k]), request.num_classes
        programs = self._programs_of(k)
        case = Case.flattened(outer, inner, predicts(label, classes).unsafe)
        result = verify(
            programs.network,
            Property(x.size, classes, (case,)),
            method="complete",
            timeout=self._timeout,
            rounding=request.rounding,
            programs=programs,
            count_compilation=False,
        )
        margins = np.zeros(classes, x.dtype)
        margins[np.arange(classes) != label] = -rounding.up(-result.margins, x.dtype)
        point = result.counterexample
        return margins, None if point is None else point.inputs.reshape(x.shape)


def _row(eps: np.ndarray, k: int) -> np.ndarray:
    """The radius of one example of a batch, or that of all of them."""
    return eps[k if len(eps) > 1 else 0]


def _on_one_example(apply: Apply) -> Callable[[PyTree, Array], Array]:
    def function(weights: PyTree, x: Array) -> Array:
        variables, constants = weights
        return one_example(apply, variables, None, constants)(x)

    return function


def _empty(*options: Any) -> dict[Any, Any]:
    """Where the programs with these options will be kept."""
    return {}
