"""A question to `certify` with its arguments checked, and how it is computed batch by batch."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from boundjax import sharding
from boundjax.certification import independence, proof
from boundjax.certification.memory import available_bytes, peak_of, readable
from boundjax.certification.models import Apply, PureModel, one_example
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
from boundjax.sets import rounding as rounding_of_sets
from boundjax.sets.checks import require_array, require_finite
from boundjax.sets.rounding import Rounding
from boundjax.sets.threat import Threat
from boundjax.tracing import refusals
from boundjax.tracing.jaxprs import program
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
      margins: compiled `(variables, threat, xs, eps, labels) -> [B, C]`.
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
      model: what is bounded.
      variables: those of the model, on the devices that compute.
      mesh: the devices that divide a batch; None for the default device.
      x: the examples `[B, ...]`.
      threat: its norm and clip range, in the dtype of `x`.
      eps: radii that broadcast to `x`, with as many dimensions.
      labels: int `[B]`.
      logits: `[B, C]`, of the examples themselves.
      program: identifies what the model computes, see `boundjax.tracing.jaxprs.program`.
      method, batch_size, max_bytes: arguments of `certify`.
      rounding: what bounds are to hold for, unless the method is a transform.
      plans: by method; a bisection runs each of them many times.
    """

    model: PureModel
    variables: PyTree
    mesh: Mesh | None
    x: np.ndarray
    threat: Threat
    eps: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    program: Hashable
    method: Method | Transform
    rounding: Rounding
    batch_size: int | None
    max_bytes: int | None
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
        pure = PureModel.of(model)
        if method in LIPSCHITZ:
            _require_finite_weights(pure.variables)
        examples = _checked_examples(x)
        if method == COMPLETE:
            _require_searchable(examples, threat)
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
        pure.require_no_fresh_draws(jnp.asarray(examples))
        classes, key = _traced(pure, examples)
        request = cls(
            model=pure,
            variables=sharding.whole(pure.variables, mesh),
            mesh=mesh,
            x=examples,
            threat=_rounded_outwards(threat, examples.dtype),
            eps=per_example(rounding_of_sets.up(threat.eps, examples.dtype), examples),
            labels=np.zeros(len(examples), np.int32),
            logits=np.zeros((len(examples), classes), examples.dtype),
            program=key,
            method=method,
            rounding=rounding,
            batch_size=batch_size,
            max_bytes=max_bytes,
        )
        logits = request._logits()
        return dataclasses.replace(
            request, logits=logits, labels=request._checked_labels(labels, logits)
        )

    @property
    def num_classes(self) -> int:
        """How many logits there are."""
        return self.logits.shape[1]

    def compiled(self, make: Callable[..., Compiled], *key: Any) -> Compiled:
        """`make(*key)`, or what it made for an earlier request of the same program."""
        return _cached(self.program, make, *key) if self.model.cacheable else make(*key)

    def _logits(self) -> np.ndarray:
        """The model's logits `[B, C]`, after checking that it is a function of one example."""
        x = self.x
        if len(x) == 1:  # mixing needs a second example to show
            x = np.concatenate([x, independence.counterparts(x)])
        size = max(2, self._share(self.methods[0])) * sharding.count(self.mesh)
        function = self.compiled(_compiled_logits, self.model.apply, self.mesh)

        def evaluate(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            results: list[np.ndarray] = []
            for start in range(0, len(x), size):
                index = np.minimum(np.arange(start, start + size), len(x) - 1)
                batch = sharding.parts(x[index], self.mesh)
                results.append(np.asarray(function(self.variables, batch)))
            both = np.concatenate(results)[: len(x)]
            return both[:, 0], both[:, 1]

        return independence.logits(evaluate, x, size)[: len(self.x)]

    def _checked_labels(self, labels: ArrayLike | None, logits: np.ndarray) -> np.ndarray:
        if labels is None:
            return np.argmax(logits, axis=-1).astype(np.int32)
        classes = np.asarray(labels)
        if classes.shape != self.x.shape[:1] or not np.issubdtype(classes.dtype, np.integer):
            raise ValueError(
                f"labels must be integers of shape {self.x.shape[:1]}, "
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
            margins = self.compiled(compiled_margins, self.model.apply, *options)
        else:
            margins = compiled_margins(self.model.apply, *options)
        total = size * sharding.count(self.mesh)
        shapes = [((total, *a.shape[1:]), a.dtype) for a in (self.x, self.eps, self.labels)]
        batch = [sharding.parts(np.zeros(*shape), self.mesh) for shape in shapes]
        lowered = margins.lower(self.variables, self.threat, *batch)
        weights = () if method == "interval" else self.model.variables
        return Plan(margins, total, peak_of(lowered.compile(), weights))

    def run(self, eps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`verified [B]` and `margins [B, C]` for a radius that broadcasts to `x`."""
        eps = np.broadcast_to(eps, (self.x.shape[0], *eps.shape[1:]))
        plans = [self.plan(method) for method in self.methods]
        bounds = [self._map(plan, (eps, self.labels)) for plan in plans]
        # `fmax` ignores NaN: a method that failed numerically does not spoil the sound bounds of
        # the other methods.
        margins = functools.reduce(np.fmax, bounds)
        return verified_by(margins, self.labels), margins

    def of(self, rows: np.ndarray, method: Method) -> Request:
        """The same question about the examples at `rows`, to be answered by one method."""
        eps = np.broadcast_to(self.eps, (self.x.shape[0], *self.eps.shape[1:]))
        return dataclasses.replace(
            self,
            x=self.x[rows],
            eps=eps[rows],
            labels=self.labels[rows],
            logits=self.logits[rows],
            method=method,
            plans={},
        )

    def _map(self, plan: Plan, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        """Applies a plan to batches of equal size; the last one is padded."""
        size, total = plan.batch_size, self.x.shape[0]
        results: list[np.ndarray] = []
        for start in range(0, total, size):
            index = np.minimum(np.arange(start, start + size), total - 1)
            batch = [sharding.parts(a[index], self.mesh) for a in (self.x, *arrays)]
            results.append(np.asarray(plan.margins(self.variables, self.threat, *batch)))
        return np.concatenate(results)[:total]


def verified_by(margins: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which examples margins `[B, C]` verify, bool `[B]`."""
    # Neither NaN nor logits that overflow certify, whatever their sign.
    rivals = other_classes(labels, margins.shape[1])
    return np.all(np.where(rivals, margins > 0, True) & np.isfinite(margins), axis=-1)


def other_classes(labels: np.ndarray, classes: int) -> np.ndarray:
    """Where a class is not the example's label, bool `[B, C]`."""
    return np.not_equal(np.arange(classes)[None], labels[:, None])


def _checked_examples(x: ArrayLike) -> np.ndarray:
    require_array("x", x)
    examples = np.asarray(x)
    if examples.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(
            f"x must be float32 or float64, got {examples.dtype}; use x.astype('float32')"
        )
    x64: bool = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    if examples.dtype == np.float64 and not x64:
        examples = examples.astype(np.float32)
    if examples.ndim < 1 or examples.shape[0] == 0:
        raise ValueError(
            f"x must be a batch [B, ...] of at least one example, got shape {examples.shape}"
        )
    require_finite("x", examples)
    return examples


def _require_searchable(x: np.ndarray, threat: Threat) -> None:
    if threat.norm != np.inf:
        raise ValueError(
            f"method 'complete' needs the norm inf, got {threat.norm:g}; take 'best' for others"
        )
    if x.dtype != np.float32:
        raise TypeError(f"method 'complete' computes in float32, got x of {x.dtype}")


def _traced(model: PureModel, x: np.ndarray) -> tuple[int, Hashable]:
    """The number of logits, and a key that identifies what the model computes now."""
    with refusals.explained():
        key, shape = program(model.apply, model.variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    if not hasattr(shape, "shape") or len(shape.shape) != 2 or shape.shape[0] != x.shape[0]:
        result = getattr(shape, "shape", type(shape).__name__)
        raise ValueError(
            f"model must return logits [B, C] with B = {x.shape[0]} for x of shape {x.shape}, "
            f"got {result}"
        )
    if shape.shape[1] < 2:
        raise ValueError(
            f"model must return at least two logits per example, got {shape.shape[1]}; for a "
            "decision at z = 0 return jnp.concatenate([jnp.zeros_like(z), z], axis=1), for the "
            "range of an output use boundjax.linear(f)(boundjax.LpBall(x, eps))"
        )
    return shape.shape[1], key


def _require_finite_weights(variables: PyTree) -> None:
    for path, leaf in jax.tree.leaves_with_path(variables):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            require_finite(f"the weights {jax.tree_util.keystr(path)}", leaf)


def _rounded_outwards(threat: Threat, dtype: np.dtype[Any]) -> Threat:
    """The threat with a clip range in this dtype, and no radius: calls take the radii apart.

    An end that is not representable is rounded outwards, as the radius is.
    """
    clip = threat.clip
    if clip is not None:
        clip = (
            -rounding_of_sets.up(-np.asarray(clip[0]), dtype),
            rounding_of_sets.up(clip[1], dtype),
        )
    return Threat(0.0, float(threat.norm), clip, outward=True)


def per_example(radius: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A radius with as many dimensions as `x`: scalar, `[B]`, or broadcastable to `x`.

    Raises:
      ValueError: for another shape.
    """
    if radius.ndim == 0:
        return np.full((x.shape[0],) + (1,) * (x.ndim - 1), radius)
    if radius.shape == x.shape[:1]:
        return radius.reshape((-1,) + (1,) * (x.ndim - 1))
    fits = radius.ndim == x.ndim and all(
        e in (1, n) for e, n in zip(radius.shape, x.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"eps must be a scalar, one per example [{x.shape[0]}], or broadcast to x of shape "
            f"{x.shape} with as many dimensions, got shape {radius.shape}"
        )
    return radius


def _compiled_logits(apply: Apply, mesh: Mesh | None) -> Jitted:
    """Compiles `(variables, xs) -> [B, 2, C]`: the logits of the batch, and one by one."""

    def logits(variables: PyTree, xs: Array) -> Array:
        alone = jax.vmap(one_example(apply, variables))(xs)
        return jnp.stack([apply(variables, xs), alone], axis=1)

    return sharding.compiled(logits, mesh, whole=1)


@functools.lru_cache(maxsize=32)
def _cached(program: Hashable, make: Callable[..., Any], *key: Any) -> Any:
    """Compiled code of an earlier call for the same program."""
    del program
    return make(*key)
