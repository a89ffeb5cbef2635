"""Certificates for a model and a batch: which predictions cannot change within a radius."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import PyTree

from boundjax.certification import independence, models, sharding
from boundjax.certification.memory import MemoryEstimate, available_bytes, peak_of, readable
from boundjax.certification.presets import (
    BEST,
    IN_BEST,
    IN_BEST_OF_BALLS,
    LIPSCHITZ,
    METHODS,
    ONE_BY_ONE,
    Transform,
    compiled_margins,
    default_batch,
    name_of,
)
from boundjax.sets import rounding
from boundjax.sets.checks import require_array, require_finite
from boundjax.sets.threat import Threat
from boundjax.tracing.jaxprs import program

# Of the free memory, what one call may take; and of that, what one block of rows may.
_SHARE_OF_MEMORY = 0.75
_BLOCK_BYTES = 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """Guaranteed answers for a batch.

    Attributes:
      verified: bool ``[B]``; True where every margin to another class is positive on the whole
        input set. An example whose label is not the model's prediction is never verified.
      margins: float ``[B, C]``; lower bounds on ``z_y - z_m`` over the input set; 0 at ``m = y``.
      labels: int ``[B]``; the classes ``y`` the certificate is about.
      method: which bounds were used.
      arithmetic: for which arithmetic it holds: ``"exact-real"``, that is for the network with
        these weights in real arithmetic, up to the rounding of the bound computation itself.
    """

    verified: np.ndarray
    margins: np.ndarray
    labels: np.ndarray
    method: str
    arithmetic: str = "exact-real"


def certify(
    model: Any,
    x: Array,
    eps: ArrayLike,
    *,
    labels: Array | None = None,
    norm: float = jnp.inf,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    method: str | Transform = "crown-ibp",
    batch_size: int | None = None,
    max_bytes: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Certificate:
    """Certifies that a classifier's decision cannot change within a radius.

    Args:
      model: logits ``[B, C]`` from a batch ``[B, ...]``: a bound Linen module,
        ``(module, variables)``, an NNX module (used in eval mode, its state left alone), or any
        callable. It is bounded one example at a time, so it must not mix examples.
      x: the inputs ``[B, ...]``, float32 or float64.
      eps: the radius in the units of ``x`` (8 / 255 for pixels in [0, 1]), ``>= 0``: a scalar, one
        per example ``[B]``, or an array that broadcasts to ``x`` with as many dimensions (per
        feature). It and the ends ``x - eps``, ``x + eps`` are rounded outwards where they are
        inexact; 0 stays the point.
      labels: classes ``[B]``; the model's own predictions where not given.
      norm: order p of the norm, 1, 2 or inf.
      clip: ``(low, high)``, the range of valid inputs, or None; ``x`` must lie in it.
      method: ``"interval"``, ``"crown-ibp"``, ``"one-step"`` (one signed gradient step on the
        slopes), ``"crown"``, ``"fast-lin"`` (exact CAP), or ``"best"``: per margin the largest of
        all these lower bounds; ``"alpha-crown"`` (20 steps, intermediate bounds too: much slower);
        ``"bcp"`` (l2 ball and box together, part of ``"best"`` for norms other than inf) or
        ``"lmt"`` (Lipschitz constants alone), with provable bounds on spectral norms;
        or a transform, say ``functools.partial(boundjax.linear, slopes="parallel")``: a function of
        one example -> a function ``(input_set, specification) -> Interval``.
      batch_size: examples per compiled call, on all devices together; as many as fit where not
        given; results do not depend on it.
      max_bytes: the most that one call may take at its peak on a device (``memory_estimate``);
        three quarters of what is free where not given.
      devices: local devices, say ``jax.local_devices()``, that divide every batch; JAX's default
        device where not given. They send each other nothing, and results do not depend on how many
        there are but for the rounding of the compiled code.

    Returns:
      A ``Certificate``.

    Raises:
      ValueError: for an empty batch, NaN inputs, a negative or NaN radius, labels out of range,
        wrong shapes, fewer than two logits, a model that mixes examples, an unknown method,
        weights without a spectral norm, devices of another process; the message says what was
        expected and what came.
      TypeError: for a model that cannot be called, inputs that are neither float32 nor float64, or
        a transform that returns no ``Interval`` (an ``Estimate`` is not a bound).
      MemoryError: for a call that does not fit, before it starts; it says which batch size does.
      UnsupportedOpError: at an op that is not in ``supported_ops()``.
    """
    threat = Threat(eps, norm, clip, outward=True)
    request = _Request.check(model, x, threat, labels, method, batch_size, max_bytes, devices)
    verified, margins = request.run(request.threat.eps)
    return Certificate(verified, margins, request.labels, name_of(method))


def memory_estimate(
    model: Any,
    x: Array,
    method: str | Transform = "crown-ibp",
    *,
    norm: float = jnp.inf,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> MemoryEstimate:
    """What ``certify`` with the same arguments will take at its peak; nothing is bounded.

    The program is compiled, as ``certify`` will need it, and the compiler asked. Of ``"best"`` it
    is the largest of its methods.

    Args:
      model, x, method, norm, clip, batch_size, max_bytes, devices: as for ``certify``.

    Returns:
      A ``MemoryEstimate``, for the batch size that ``certify`` would choose.

    Raises:
      ValueError, TypeError, MemoryError, UnsupportedOpError: as ``certify``.
    """
    threat = Threat(0.0, norm, clip, outward=True)
    request = _Request.check(model, x, threat, None, method, batch_size, max_bytes, devices)
    plans = [request.plan(name) for name in request.methods]
    largest = max(plans, key=lambda plan: plan.peak)
    return MemoryEstimate(largest.peak, largest.batch_size, available_bytes(request.devices))


def certified_radius(
    model: Any,
    x: Array,
    *,
    labels: Array | None = None,
    norm: float = jnp.inf,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    method: str | Transform = "crown-ibp",
    eps_max: float = 1.0,
    steps: int = 12,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> np.ndarray:
    """The largest certified radius of every example, by bisection between 0 and ``eps_max``.

    Args:
      model, x, labels, norm, clip, method, batch_size, max_bytes, devices: as for ``certify``.
      eps_max: the largest radius tried, in the units of ``x``.
      steps: halvings; the answer is within ``eps_max / 2 ** steps`` of what the bounds can prove.

    Returns:
      ``[B]``; ``certify`` succeeded at exactly this radius (``eps_max`` where it succeeded there);
      0 where no tried radius could be certified, misclassified examples among them.

    Raises:
      ValueError, TypeError, UnsupportedOpError: as ``certify``; ValueError for ``steps < 1``.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if np.ndim(eps_max) != 0:
        raise ValueError(f"eps_max must be a scalar, got shape {np.shape(eps_max)}")
    threat = Threat(eps_max, norm, clip, outward=True)
    request = _Request.check(model, x, threat, labels, method, batch_size, max_bytes, devices)
    shape = (request.x.shape[0],) + (1,) * (request.x.ndim - 1)
    high = request.threat.eps.reshape(shape[0], -1)[:, 0]
    certified, _ = request.run(high.reshape(shape))
    low = np.where(certified, high, np.zeros_like(high))
    for _ in range(steps):
        middle = (0.5 * (low + high)).astype(high.dtype)
        certified, _ = request.run(middle.reshape(shape))
        low = np.where(certified, middle, low)
        high = np.where(certified, high, middle)
    return low


class _Plan(NamedTuple):
    """How a method is run: ``margins(variables, threat, xs, eps, labels)`` on so many examples.

    Those are of all devices together, the bytes of its peak are of each.
    """

    margins: Callable[..., Array]
    batch_size: int
    peak: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Request:
    """A checked question: everything but the radius is settled."""

    model: models.PureModel
    variables: PyTree  # the model's, where they are computed with
    mesh: Mesh | None  # the devices that divide a batch; None: the default device
    x: np.ndarray
    threat: Threat  # its radius broadcasts to x, with x's number of dimensions
    labels: np.ndarray
    num_classes: int
    program: Hashable
    method: str | Transform
    batch_size: int | None
    max_bytes: int | None
    # By method: a bisection asks many times within one call.
    plans: dict[str | Transform, _Plan] = dataclasses.field(default_factory=dict)

    @classmethod
    def check(
        cls,
        model: Any,
        x: Array,
        threat: Threat,
        labels: Array | None,
        method: str | Transform,
        batch_size: int | None,
        max_bytes: int | None,
        devices: Sequence[jax.Device] | None,
    ) -> _Request:
        if not callable(method) and method not in (*METHODS, BEST):
            raise ValueError(
                f"method must be one of {', '.join((*METHODS, BEST))} or a transform, "
                f"got {method!r}"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be >= 1 or None, got {max_bytes}")
        pure = models.PureModel.of(model)
        if method in LIPSCHITZ:
            _require_finite_weights(pure.variables)
        require_array("x", x)
        x = np.asarray(x)
        if x.dtype not in (np.float32, np.float64):
            raise TypeError(f"x must be float32 or float64, got {x.dtype}; use x.astype('float32')")
        if x.dtype == np.float64 and not jax.config.jax_enable_x64:
            x = x.astype(np.float32)
        if x.ndim < 1 or x.shape[0] == 0:
            raise ValueError(
                f"x must be a batch [B, ...] of at least one example, got shape {x.shape}"
            )
        require_finite("x", x)
        clip = threat.clip
        if clip is not None and ((x < clip[0]) | (x > clip[1])).any():
            raise ValueError(
                f"x must lie in the clip range {clip}, got values from {x.min()} to {x.max()}"
            )
        mesh = sharding.mesh_of(devices, len(x))
        num_classes, program = _traced(pure, x)
        request = cls(
            model=pure,
            variables=sharding.whole(pure.variables, mesh),
            mesh=mesh,
            x=x,
            threat=_rounded_outwards(threat, x),
            labels=np.zeros(x.shape[0], np.int32),
            num_classes=num_classes,
            program=program,
            method=method,
            batch_size=batch_size,
            max_bytes=max_bytes,
        )
        return dataclasses.replace(request, labels=request._checked_labels(labels))

    @property
    def _anywhere(self) -> Threat:
        """What all examples share; a compiled call takes the radii beside it."""
        return self.threat.within(0.0)

    def _compile(self, make: Callable[..., Callable], *key: Any) -> Callable[..., Array]:
        return _kept(self.program, make, *key) if self.model.cacheable else make(*key)

    def _logits(self) -> np.ndarray:
        """The model's logits ``[B, C]``, after a check that it is a function of one example."""
        x = self.x if len(self.x) > 1 else np.concatenate([self.x, independence.others(self.x)])
        size = max(2, self._share(self.method)) * sharding.count(self.mesh)
        function = self._compile(_make_logits, self.model.apply, self.mesh)

        def evaluate(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            results = []
            for start in range(0, len(x), size):
                index = np.minimum(np.arange(start, start + size), len(x) - 1)
                batch = sharding.parts(x[index], self.mesh)
                results.append(np.asarray(function(self.variables, batch)))
            return np.moveaxis(np.concatenate(results)[: len(x)], 1, 0)

        return independence.logits(evaluate, x, size)[: len(self.x)]

    def _checked_labels(self, labels: Array | None) -> np.ndarray:
        logits = self._logits()
        if labels is None:
            return np.argmax(logits, axis=-1).astype(np.int32)
        labels = np.asarray(labels)
        if labels.shape != self.x.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels must be integers of shape {self.x.shape[:1]}, "
                f"got {labels.dtype} of shape {labels.shape}"
            )
        bad = (labels < 0) | (labels >= self.num_classes)
        if bad.any():
            raise ValueError(
                f"labels must be in 0..{self.num_classes - 1} for {self.num_classes} logits, "
                f"got {labels[bad][0]} at index {np.argmax(bad)}"
            )
        return labels.astype(np.int32)

    @property
    def methods(self) -> tuple[str | Transform, ...]:
        """Which methods are run."""
        if self.method != BEST:
            return (self.method,)
        return IN_BEST if self.threat.norm == np.inf else IN_BEST_OF_BALLS

    @property
    def devices(self) -> Sequence[jax.Device] | None:
        """Those that divide a batch; None: the default device."""
        return None if self.mesh is None else list(self.mesh.devices.flat)

    def _share(self, name: str | Transform) -> int:
        """How many examples of a batch one device gets."""
        count = sharding.count(self.mesh)
        asked = -(-self.batch_size // count) if self.batch_size else default_batch(name)
        return min(asked, -(-len(self.x) // count))

    def plan(self, name: str | Transform) -> _Plan:
        """The compiled margins of a method, for as many examples as asked, or as fit.

        Raises:
          MemoryError: if that many do not fit that were asked for, or not even one.
        """
        if name not in self.plans:
            self.plans[name] = self._plan(name)
        return self.plans[name]

    def _plan(self, name: str | Transform) -> _Plan:
        free = available_bytes(self.devices)
        budget = self.max_bytes
        if budget is None and free is not None:
            budget = int(_SHARE_OF_MEMORY * free)
        count = sharding.count(self.mesh)
        asked = size = self._share(name)
        while True:
            plan = self._planned(name, size)
            if budget is None or plan.peak <= budget:
                break
            if size == 1:
                raise MemoryError(
                    f"method {name_of(name)!r} needs about {readable(plan.peak)} for one example, "
                    f"but {readable(budget)} may be used; take a cheaper method (crown-ibp, "
                    "interval) or, if there is more memory, a larger max_bytes"
                )
            if size == asked:
                wanted = plan.peak
            size = max(1, min(size // 2, int(size * budget / plan.peak)))
        if self.batch_size is not None and size < asked:
            raise MemoryError(
                f"batch_size {asked * count} with method {name_of(name)!r} needs about "
                f"{readable(wanted)}{' on each device' if count > 1 else ''}, but "
                f"{readable(budget)} may be used; batch_size={size * count} fits"
            )
        return plan

    def _planned(self, name: str | Transform, size: int) -> _Plan:
        """The margins of a method, compiled for so many examples on each device."""
        one_by_one = name in ONE_BY_ONE and jax.default_backend() == "cpu"
        block = _BLOCK_BYTES if self.max_bytes is None else min(_BLOCK_BYTES, self.max_bytes)
        if not one_by_one:
            block = max(1, block // size)
        key = (self.model.apply, name, self.num_classes, block, one_by_one, self.mesh)
        # A transform hides its options from the cache, whose keys must tell all.
        make = self._compile if isinstance(name, str) else lambda make, *key: make(*key)
        margins = make(compiled_margins, *key)
        total = size * sharding.count(self.mesh)
        shapes = [((total, *a.shape[1:]), a.dtype) for a in (self.x, self.threat.eps, self.labels)]
        batch = [sharding.parts(np.zeros(*shape), self.mesh) for shape in shapes]
        lowered = margins.lower(self.variables, self._anywhere, *batch)
        weights = () if name == "interval" else self.model.variables
        return _Plan(margins, total, peak_of(lowered.compile(), weights))

    def run(self, eps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``verified [B]`` and ``margins [B, C]`` for a radius that broadcasts to ``x``."""
        eps = np.broadcast_to(eps, (self.x.shape[0], *eps.shape[1:]))
        plans = [self.plan(name) for name in self.methods]
        bounds = [self._map(plan, (eps, self.labels)) for plan in plans]
        # fmax: a method that failed numerically (NaN) does not spoil the others' sound bounds.
        margins = functools.reduce(np.fmax, bounds)
        others = np.arange(self.num_classes)[None] != self.labels[:, None]
        # NaN does not certify, nor do logits that overflow, whatever side they are on.
        verified = (np.where(others, margins > 0, True) & np.isfinite(margins)).all(axis=-1)
        return verified, margins

    def _map(self, plan: _Plan, others: tuple[np.ndarray, ...]) -> np.ndarray:
        """Applies a plan to batches of equal size; the last one is filled up."""
        size, total = plan.batch_size, self.x.shape[0]
        results = []
        for start in range(0, total, size):
            index = np.minimum(np.arange(start, start + size), total - 1)
            batch = [sharding.parts(a[index], self.mesh) for a in (self.x, *others)]
            results.append(np.asarray(plan.margins(self.variables, self._anywhere, *batch)))
        return np.concatenate(results)[:total]


def _traced(model: models.PureModel, x: np.ndarray) -> tuple[int, Hashable]:
    """The number of logits, and the key of what the model computes now."""
    key, shape = program(model.apply, model.variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    if not hasattr(shape, "shape") or len(shape.shape) != 2 or shape.shape[0] != x.shape[0]:
        got = getattr(shape, "shape", type(shape).__name__)
        raise ValueError(
            f"model must return logits [B, C] with B = {x.shape[0]} for x of shape {x.shape}, "
            f"got {got}"
        )
    if shape.shape[1] < 2:
        raise ValueError(
            f"model must return at least two logits per example, got {shape.shape[1]}; for a "
            "decision at z = 0 return jnp.concatenate([jnp.zeros_like(z), z], axis=1), for the "
            "range of an output use boundjax.linear(f)(boundjax.LpBall(x, eps))"
        )
    return shape.shape[1], key


def _require_finite_weights(variables: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            require_finite(f"the weights {jax.tree_util.keystr(path)}", leaf)


def _rounded_outwards(threat: Threat, x: np.ndarray) -> Threat:
    """The threat to a batch ``x``, with a radius per example and all numbers of its dtype.

    A range that is not representable is rounded outwards, as the radius is.
    """
    clip = threat.clip
    if clip is not None:
        clip = (-rounding.up(-np.asarray(clip[0]), x.dtype), rounding.up(clip[1], x.dtype))
    return dataclasses.replace(threat, eps=_per_example(threat.eps, x), clip=clip)


def _per_example(eps: ArrayLike, x: np.ndarray) -> np.ndarray:
    """The radius with as many dimensions as ``x``: scalar, ``[B]``, or broadcastable to ``x``.

    It is rounded up: 0.01 is no float32, and the nearest one is less.
    """
    eps = rounding.up(eps, x.dtype)
    if eps.ndim == 0:
        return np.full((x.shape[0],) + (1,) * (x.ndim - 1), eps)
    if eps.shape == x.shape[:1]:
        return eps.reshape((-1,) + (1,) * (x.ndim - 1))
    fits = eps.ndim == x.ndim and all(e in (1, n) for e, n in zip(eps.shape, x.shape, strict=True))
    if not fits:
        raise ValueError(
            f"eps must be a scalar, one per example [{x.shape[0]}], or broadcast to x of shape "
            f"{x.shape} with as many dimensions, got shape {eps.shape}"
        )
    return eps


def _make_logits(apply: Callable, mesh: Mesh | None) -> Callable[..., Array]:
    """Compiles ``(variables, xs) -> [B, 2, C]``: the logits of the batch, and one by one."""

    def logits(variables: PyTree, xs: Array) -> Array:
        alone = jax.vmap(lambda x: apply(variables, x[None])[0])(xs)
        return jnp.stack([apply(variables, xs), alone], axis=1)

    return sharding.compiled(logits, mesh, whole=1)


@functools.lru_cache(maxsize=32)
def _kept(program: Hashable, make: Callable[..., Callable], *key: Any) -> Callable[..., Array]:
    """Compiled code of an earlier call, for the same program only."""
    del program
    return make(*key)
