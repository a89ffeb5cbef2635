"""A question to `certify` with its arguments checked, and how it is computed batch by batch."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from boundjax import sharding
from boundjax.certification import independence, proof
from boundjax.certification.applies import Apply, one_example, rows_of
from boundjax.certification.inputs import (
    checked_constants,
    checked_examples,
    per_example,
    require_finite_weights,
    require_searchable,
    rounded_outwards,
)
from boundjax.certification.memory import available_bytes, peak_of, readable
from boundjax.certification.models import PureModel
from boundjax.certification.presets import (
    BEST,
    COMPLETE,
    IN_BEST,
    IN_BEST_OF_BALLS,
    IN_COMPLETE,
    LIPSCHITZ,
    NAMES,
    ONE_BY_ONE,
    Method,
    Transform,
    compiled_margins,
    default_batch,
    name_of,
)
from boundjax.certification.progress import Progress, Steps
from boundjax.certification.traced import TracedApply, traced
from boundjax.sets import rounding as rounding_of_sets
from boundjax.sets.rounding import Rounding
from boundjax.sets.threat import Threat
from boundjax.transforms.problem import require_plain_sums
from boundjax.typing import Device, Jitted, PyTree

Compiled = TypeVar("Compiled")

# Fraction of the free memory that one call may take.
_SHARE_OF_MEMORY = 0.75
# Memory for one block of rows of intermediate bounds, for all examples of a call together.
_BLOCK_BYTES = 2**30


class Plan(NamedTuple):
    """How a method is run.

    Attributes:
      margins: compiled `(variables, threat, xs, eps, labels, constants) -> [B, ..., C]`.
      batch_size: examples of one call, on all devices together.
      peak: bytes of one call on each device.
    """

    margins: Jitted
    batch_size: int
    peak: int


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A checked question: only the radius may still change.

    Attributes:
      model: what was asked about.
      apply: the model as a traced function of one example in a batch of its own: what is bounded.
      variables: those of `apply`, on the devices that compute.
      mesh: the devices that divide a batch; None for the default device.
      x: the examples `[B, ...]`.
      threat: its norm and clip range, in the dtype of `x`.
      eps: radii that broadcast to `x`, with as many dimensions.
      constants: none, or one pytree of arrays `[B, ...]` that the model takes after `x`.
      labels: int `[B]`, or `[B, ...]` for a model that classifies several positions.
      logits: `[B, ..., C]`, of the examples themselves.
      method, batch_size, max_bytes: arguments of `certify`.
      rounding: what bounds are to hold for, unless the method is a transform.
      progress: is told what has been done.
      plans: by method; a bisection runs each of them many times.
    """

    model: PureModel
    apply: TracedApply
    variables: PyTree
    mesh: Mesh | None
    x: np.ndarray
    threat: Threat
    eps: np.ndarray
    constants: tuple[PyTree, ...]
    labels: np.ndarray
    logits: np.ndarray
    method: Method | Transform
    rounding: Rounding
    batch_size: int | None
    max_bytes: int | None
    progress: Progress | None
    plans: dict[Method | Transform, Plan] = dataclasses.field(
        default_factory=dict[Method | Transform, Plan]
    )

    @classmethod
    def check(
        cls,
        model: Any,
        x: ArrayLike,
        threat: Threat,
        labels: ArrayLike | None,
        method: Method | Transform,
        rounding: Rounding,
        batch_size: int | None,
        max_bytes: int | None,
        devices: Sequence[Device] | None,
        *,
        constants: PyTree = None,
        call: Mapping[str, Any] | None = None,
        output: Callable[[Any], Array] | None = None,
        progress: Progress | None = None,
    ) -> Request:
        """Checks the arguments of `certify`, and that the model treats examples independently.

        Raises:
          ValueError, TypeError: as `certify`.
          NoProofError: if the device has no proof for this rounding.
        """
        if not callable(method) and method not in NAMES:
            raise ValueError(
                f"method must be one of {', '.join(NAMES)} or a transform, got {method!r}"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be >= 1 or None, got {max_bytes}")
        pure = PureModel.of(model, call=call, output=output)
        if method in LIPSCHITZ:
            require_finite_weights(pure.variables)
        examples = checked_examples(x)
        of_examples = checked_constants(constants, len(examples))
        if method == COMPLETE:
            require_searchable(examples, threat)
        clip = threat.clip
        if clip is not None and ((examples < clip[0]) | (examples > clip[1])).any():
            raise ValueError(
                f"x must lie in the clip range {clip}, got values from {examples.min()} to "
                f"{examples.max()}"
            )
        mesh = sharding.mesh_of(devices, len(examples))
        if rounding != "nearest":
            for platform in {jax.default_backend()} if mesh is None else sharding.platforms(mesh):
                require_plain_sums(platform)
        single = traced(pure, examples, of_examples, 1)
        pure.require_no_fresh_draws(jnp.asarray(examples), of_examples)
        outputs = (len(examples), *single.shape[1:])
        if method == COMPLETE and len(outputs) > 2:
            raise ValueError(
                f"method 'complete' needs one decision per example, but the model returns logits "
                f"{outputs}; pick a position with output=lambda z: z[:, 0], or take 'best'"
            )
        request = cls(
            model=pure,
            apply=single.apply,
            variables=sharding.whole(single.variables, mesh),
            mesh=mesh,
            x=examples,
            threat=rounded_outwards(threat, examples.dtype),
            eps=per_example(rounding_of_sets.up(threat.eps, examples.dtype), examples),
            constants=of_examples,
            labels=np.zeros(outputs[:-1], np.int32),
            logits=np.zeros(outputs, examples.dtype),
            method=method,
            rounding=rounding,
            batch_size=batch_size,
            max_bytes=max_bytes,
            progress=progress,
        )
        logits = request._logits()
        return dataclasses.replace(
            request, logits=logits, labels=request._checked_labels(labels, logits)
        )

    @property
    def num_classes(self) -> int:
        """How many logits there are."""
        return self.logits.shape[-1]

    def compiled(self, make: Callable[..., Compiled], *key: Any) -> Compiled:
        """`make(apply, *key)`, or what it made for an earlier request of the same program."""
        closed = self.apply.program.is_closed
        return _cached(make, self.apply, *key) if closed else make(self.apply, *key)

    def _logits(self) -> np.ndarray:
        """The model's logits `[B, C]`, after checking that it is a function of one example."""
        x, constants = self.x, self.constants
        if len(x) == 1:  # mixing needs a second example to show
            other = independence.counterparts(x), independence.other_constants(constants, 1)
            x = np.concatenate([x, other[0]])
            constants = jax.tree.map(lambda *pair: np.concatenate(pair), constants, other[1])
        share = max(2, self._share(self.methods[0]))
        size = share * sharding.count(self.mesh)
        batch = traced(self.model, x, constants, share)
        if batch.shape[1:] != self.logits.shape[1:]:
            raise ValueError(
                f"model must give logits of one shape for every batch, got {batch.shape[1:]} in a "
                f"batch of {share} and {self.logits.shape[1:]} for one example alone"
            )
        function = self.compiled(_compiled_logits, batch.apply, self.mesh)
        variables = self.variables, sharding.whole(batch.variables, self.mesh)

        def evaluate(x: np.ndarray, constants: PyTree) -> tuple[np.ndarray, np.ndarray]:
            results: list[np.ndarray] = []
            for start in range(0, len(x), size):
                index = np.minimum(np.arange(start, start + size), len(x) - 1)
                arrays = self._placed((x, constants), index)
                results.append(np.asarray(function(*variables, *arrays)))
            both = np.concatenate(results)[: len(x)].reshape(len(x), 2, -1)
            return both[:, 0], both[:, 1]

        logits = independence.logits(evaluate, x, constants, size)[: len(self.x)]
        return logits.reshape(self.logits.shape)

    def _placed(self, arrays: PyTree, index: np.ndarray) -> PyTree:
        """Some rows of arrays `[B, ...]`, on the devices that compute."""

        def placed(array: np.ndarray) -> Array:
            return sharding.parts(array[index], self.mesh)

        return jax.tree.map(placed, arrays)

    def _checked_labels(self, labels: ArrayLike | None, logits: np.ndarray) -> np.ndarray:
        if labels is None:
            return np.argmax(logits, axis=-1).astype(np.int32)
        classes = np.asarray(labels)
        shape = logits.shape[:-1]
        if classes.shape != shape or not np.issubdtype(classes.dtype, np.integer):
            raise ValueError(
                f"labels must be integers of shape {shape}, "
                f"got {classes.dtype} of shape {classes.shape}"
            )
        bad = (classes < 0) | (classes >= self.num_classes)
        if bad.any():
            raise ValueError(
                f"labels must be in 0..{self.num_classes - 1} for {self.num_classes} logits, "
                f"got {classes[bad][0]} at index {np.argmax(bad)}"
            )
        return classes.astype(np.int32)

    @property
    def methods(self) -> Sequence[Method | Transform]:
        """The methods to run, several for `"best"` and `"complete"`."""
        if self.method == COMPLETE:
            return IN_COMPLETE
        if self.method != BEST:
            return (self.method,)
        return IN_BEST if self.threat.norm == np.inf else IN_BEST_OF_BALLS

    @property
    def arithmetic(self) -> Rounding:
        """What the answers hold for."""
        return proof.rounding_of(self.method) if callable(self.method) else self.rounding

    @property
    def devices(self) -> Sequence[Device] | None:
        """The devices that divide a batch; None for the default device."""
        return None if self.mesh is None else list(self.mesh.devices.flat)

    def _share(self, method: Method | Transform) -> int:
        """How many examples of a batch one device gets."""
        count = sharding.count(self.mesh)
        wanted = -(-self.batch_size // count) if self.batch_size else default_batch(method)
        return min(wanted, -(-len(self.x) // count))

    def plan(self, method: Method | Transform) -> Plan:
        """The compiled margins of a method, for the requested batch size or one that fits.

        Raises:
          MemoryError: if the requested batch size does not fit, or not even one example.
        """
        if method not in self.plans:
            self.plans[method] = self._fitting_plan(method)
        return self.plans[method]

    def _fitting_plan(self, method: Method | Transform) -> Plan:
        budget = self._budget()
        count = sharding.count(self.mesh)
        requested = size = self._share(method)
        plan = whole = self._plan(method, size)
        while budget is not None and plan.peak > budget:
            if size == 1:
                raise MemoryError(
                    f"method {name_of(method)!r} needs about {readable(plan.peak)} for one "
                    f"example, but {readable(budget)} may be used; take a cheaper method "
                    "(crown-ibp, interval) or, if there is more memory, a larger max_bytes"
                )
            size = max(1, min(size // 2, int(size * budget / plan.peak)))
            plan = self._plan(method, size)
        if budget is not None and self.batch_size is not None and size < requested:
            raise MemoryError(
                f"batch_size {requested * count} with method {name_of(method)!r} needs about "
                f"{readable(whole.peak)}{' on each device' if count > 1 else ''}, but "
                f"{readable(budget)} may be used; batch_size={size * count} fits"
            )
        return plan

    def _budget(self) -> int | None:
        """Bytes that one call may take on a device; None where the system does not tell."""
        if self.max_bytes is not None:
            return self.max_bytes
        free = available_bytes(self.devices)
        return None if free is None else int(_SHARE_OF_MEMORY * free)

    def _plan(self, method: Method | Transform, size: int) -> Plan:
        """The margins of a method, compiled for `size` examples on each device."""
        one_by_one = method in ONE_BY_ONE and jax.default_backend() == "cpu"
        block = _BLOCK_BYTES if self.max_bytes is None else min(_BLOCK_BYTES, self.max_bytes)
        if not one_by_one:
            block = max(1, block // size)
        options = (method, self.num_classes, block, one_by_one, self.mesh, self.rounding)
        # Compiled code of a custom transform is not cached: its options may change unseen.
        if isinstance(method, str):
            margins = self.compiled(compiled_margins, *options)
        else:
            margins = compiled_margins(self.apply, *options)
        total = size * sharding.count(self.mesh)
        arrays = (self.x, self.eps, self.labels, self.constants)
        batch = self._placed(arrays, np.zeros(total, int))
        lowered = margins.lower(self.variables, self.threat, *batch)
        weights = () if method == "interval" else self.variables
        return Plan(margins, total, peak_of(lowered.compile(), weights))

    def run(self, eps: np.ndarray, steps: Steps | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`verified [B, ...]` and `margins [B, ..., C]` for a radius that broadcasts to `x`.

        Args:
          eps: the radius.
          steps: counts what is done; by default that of this call alone.
        """
        eps = np.broadcast_to(eps, (self.x.shape[0], *eps.shape[1:]))
        plans = [self.plan(method) for method in self.methods]
        steps = steps or Steps(self.progress, len(plans) * len(self.x), len(self.x))
        margins: np.ndarray | None = None
        for plan in plans:
            bounds = self._map(plan, (eps, self.labels), steps, margins)
            # `fmax` ignores NaN: a method that failed numerically does not spoil the sound bounds
            # of the other methods.
            margins = bounds if margins is None else np.fmax(margins, bounds)
        assert margins is not None  # every request has a method
        return verified_by(margins, self.labels), margins

    def of(self, rows: np.ndarray, method: Method) -> Request:
        """The same question about the examples at `rows`, to be answered by one method."""
        eps = np.broadcast_to(self.eps, (self.x.shape[0], *self.eps.shape[1:]))
        return dataclasses.replace(
            self,
            x=self.x[rows],
            eps=eps[rows],
            constants=rows_of(self.constants, rows),
            labels=self.labels[rows],
            logits=self.logits[rows],
            method=method,
            plans={},
        )

    def _map(
        self, plan: Plan, arrays: tuple[np.ndarray, ...], steps: Steps, margins: np.ndarray | None
    ) -> np.ndarray:
        """Applies a plan to batches of equal size; the last one is padded.

        Args:
          plan: what is applied.
          arrays: radii and labels.
          steps: counts the examples that are done, and those that stay open with `margins`, which
            are those of other methods.
        """
        size, total = plan.batch_size, self.x.shape[0]
        results: list[np.ndarray] = []
        for start in range(0, total, size):
            index = np.minimum(np.arange(start, start + size), total - 1)
            batch = self._placed((self.x, *arrays, self.constants), index)
            results.append(np.asarray(plan.margins(self.variables, self.threat, *batch)))
            rows = np.arange(start, min(start + size, total))
            reached = results[-1][: len(rows)]
            if margins is not None:
                reached = np.fmax(reached, margins[rows])
            steps.bounded(rows, verified_by(reached, self.labels[rows]))
        return np.concatenate(results)[:total]


def verified_by(margins: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which examples margins `[B, ..., C]` verify, bool `[B, ...]`."""
    # Neither NaN nor logits that overflow certify, whatever their sign.
    rivals = other_classes(labels, margins.shape[-1])
    return np.all(np.where(rivals, margins > 0, True) & np.isfinite(margins), axis=-1)


def other_classes(labels: np.ndarray, classes: int) -> np.ndarray:
    """Where a class is not the example's label, bool `[B, ..., C]`."""
    return np.not_equal(np.arange(classes), labels[..., None])


def _compiled_logits(single: Apply, whole: Apply, mesh: Mesh | None) -> Jitted:
    """Compiles `(variables, variables, xs, constants) -> [B, 2, ..., C]`.

    Args:
      single: the model as it is bounded, for one example in a batch of its own.
      whole: the model for a batch.
      mesh: the devices that divide it.

    Returns:
      The logits of the batch, and those of its examples one by one.
    """

    def logits(of_single: PyTree, of_whole: PyTree, xs: Array, constants: Any) -> Array:
        def alone(x: Array, constants: Any) -> Array:
            return one_example(single, of_single, None, constants)(x)

        together = whole(of_whole, xs, None, constants)
        return jnp.stack([together, jax.vmap(alone)(xs, constants)], axis=1)

    return sharding.compiled(logits, mesh, whole=2)


@functools.lru_cache(maxsize=32)
def _cached(make: Callable[..., Any], *key: Any) -> Any:
    """Compiled code of an earlier call for the same programs."""
    return make(*key)
