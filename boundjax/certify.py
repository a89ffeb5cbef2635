"""Certificates for a model and a batch: which predictions cannot change within a radius."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import Array, ArrayTree, Numeric

from boundjax import graph, models
from boundjax.sets import Interval, LpBall, require_clip, require_finite, require_radius
from boundjax.slopes import optimized
from boundjax.specification import margin_specification
from boundjax.training.losses import robust_cross_entropy
from boundjax.transforms.interval import interval
from boundjax.transforms.linear import linear


def _preset(**options: Any) -> Callable[[Callable[[Array], Array], int], Callable[..., Any]]:
    return lambda f, max_bytes: linear(f, sides="lower", max_bytes=max_bytes, **options)


# Every sound method by name: (function of one example, byte budget) -> bounds function.
METHODS: Mapping[str, Callable[[Callable[[Array], Array], int], Callable[..., Any]]] = {
    "interval": lambda f, max_bytes: interval(f),
    "crown-ibp": _preset(),
    # From CROWN's slopes, not the papers' 0.5: the start counts too, so never worse than crown-ibp.
    "one-step": _preset(slopes=optimized(objective=robust_cross_entropy, start="adaptive")),
    "crown": _preset(intermediate="linear"),
    # To the letter, so that published errors are reproduced: see `linear`'s `intersect`.
    "fast-lin": _preset(slopes="parallel", intermediate="linear", intersect=False),
    # 20 steps of Adam; the rate and its decay did best on the stored bounds of another library.
    "alpha-crown": _preset(
        slopes=optimized(
            steps=20,
            rule=optax.adam(optax.exponential_decay(0.5, transition_steps=1, decay_rate=0.9)),
            per_spec=True,
            optimize_intermediate=True,
        ),
        intermediate="linear",
    ),
}

_BEST = "best"
# Of its methods: alpha-CROWN costs tens of times as much as all the others together.
_IN_BEST = ("interval", "crown-ibp", "one-step", "crown", "fast-lin")

# Examples in one compiled call where the caller does not say.
_DEFAULT_BATCH = {"interval": 512, "crown-ibp": 128, "one-step": 128, "alpha-crown": 4}
_DEFAULT_BATCH_OTHERS = 16

# A transform of the user's: function of one example -> function from an input set to an Interval.
Transform = Callable[[Callable[[Array], Array]], Callable[..., Any]]


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
    eps: Numeric,
    *,
    labels: Array | None = None,
    norm: float = jnp.inf,
    clip: tuple[Numeric, Numeric] | None = None,
    method: str | Transform = "crown-ibp",
    batch_size: int | None = None,
    max_bytes: int = 2**30,
) -> Certificate:
    """Certifies that a classifier's decision cannot change within a radius.

    Args:
      model: logits ``[B, C]`` from a batch ``[B, ...]``: a bound Linen module,
        ``(module, variables)``, an NNX module (used in eval mode, its state left alone), or any
        callable. It is bounded one example at a time, so it must not mix examples.
      x: the inputs ``[B, ...]``, float32 or float64.
      eps: the radius in the units of ``x`` (8 / 255 for pixels in [0, 1]), ``>= 0``: a scalar, one
        per example ``[B]``, or an array that broadcasts to ``x`` with as many dimensions (per
        feature).
      labels: classes ``[B]``; the model's own predictions where not given.
      norm: order p of the norm, 1, 2 or inf.
      clip: ``(low, high)``, the range of valid inputs, or None; ``x`` must lie in it.
      method: ``"interval"``, ``"crown-ibp"``, ``"one-step"`` (one signed gradient step on the
        slopes), ``"crown"``, ``"fast-lin"`` (exact CAP), or ``"best"``: per margin the largest of
        all these lower bounds; ``"alpha-crown"`` (20 steps, intermediate bounds too: much slower);
        or a transform, say ``functools.partial(boundjax.linear, slopes="parallel")``: a function of
        one example -> a function ``(input_set, specification) -> Interval``.
      batch_size: examples per compiled call; results do not depend on it.
      max_bytes: budget for the intermediate linear bounds of one call.

    Returns:
      A ``Certificate``.

    Raises:
      ValueError: for an empty batch, NaN inputs, a negative or NaN radius, labels out of range,
        wrong shapes, an unknown method; the message says what was expected and what came.
      TypeError: for a model that cannot be called, inputs that are neither float32 nor float64, or
        a transform that returns no ``Interval`` (an ``Estimate`` is not a bound).
      UnsupportedOpError: at an op that is not in ``supported_ops()``.
    """
    request = _Request.check(model, x, eps, labels, norm, clip, method, batch_size, max_bytes)
    verified, margins = request.run(request.eps)
    return Certificate(verified, margins, request.labels, _name(method))


def certified_radius(
    model: Any,
    x: Array,
    *,
    labels: Array | None = None,
    norm: float = jnp.inf,
    clip: tuple[Numeric, Numeric] | None = None,
    method: str | Transform = "crown-ibp",
    eps_max: float = 1.0,
    steps: int = 12,
    batch_size: int | None = None,
    max_bytes: int = 2**30,
) -> np.ndarray:
    """The largest certified radius of every example, by bisection between 0 and ``eps_max``.

    Args:
      model, x, labels, norm, clip, method, batch_size, max_bytes: as for ``certify``.
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
    request = _Request.check(model, x, eps_max, labels, norm, clip, method, batch_size, max_bytes)
    shape = (request.x.shape[0],) + (1,) * (request.x.ndim - 1)
    high = request.eps.reshape(shape[0], -1)[:, 0]
    certified, _ = request.run(high.reshape(shape))
    low = np.where(certified, high, np.zeros_like(high))
    for _ in range(steps):
        middle = (0.5 * (low + high)).astype(high.dtype)
        certified, _ = request.run(middle.reshape(shape))
        low = np.where(certified, middle, low)
        high = np.where(certified, high, middle)
    return low


@dataclasses.dataclass(frozen=True, eq=False)
class _Request:
    """A checked question: everything but the radius is settled."""

    model: models.PureModel
    x: np.ndarray
    eps: np.ndarray  # broadcasts to x, with x's number of dimensions
    labels: np.ndarray
    num_classes: int
    program: Hashable
    norm: float
    clip: tuple[Numeric, Numeric] | None
    method: str | Transform
    batch_size: int
    max_bytes: int
    # Compiled margins by method: a bisection asks many times within one call.
    compiled: dict[str | Transform, Callable[..., Array]] = dataclasses.field(default_factory=dict)

    @classmethod
    def check(
        cls,
        model: Any,
        x: Array,
        eps: Numeric,
        labels: Array | None,
        norm: float,
        clip: tuple[Numeric, Numeric] | None,
        method: str | Transform,
        batch_size: int | None,
        max_bytes: int,
    ) -> _Request:
        if not callable(method) and method not in (*METHODS, _BEST):
            raise ValueError(
                f"method must be one of {', '.join((*METHODS, _BEST))} or a transform, "
                f"got {method!r}"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be >= 1, got {max_bytes}")
        if not norm >= 1:
            raise ValueError(f"norm must be 1, 2 or inf (any order >= 1), got {norm}")
        pure = models.as_pure(model)
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
        require_radius(eps)
        require_clip(clip)
        if clip is not None and ((x < clip[0]) | (x > clip[1])).any():
            raise ValueError(
                f"x must lie in the clip range {clip}, got values from {x.min()} to {x.max()}"
            )
        num_classes, program = _traced(pure, x)
        name = method if isinstance(method, str) else None
        batch = batch_size or _DEFAULT_BATCH.get(name, _DEFAULT_BATCH_OTHERS)
        request = cls(
            model=pure,
            x=x,
            eps=_per_example(eps, x),
            labels=np.zeros(x.shape[0], np.int32),
            num_classes=num_classes,
            program=program,
            norm=float(norm),
            clip=clip,
            method=method,
            batch_size=min(batch, x.shape[0]),
            max_bytes=max_bytes,
        )
        return dataclasses.replace(request, labels=request._checked_labels(labels))

    def _compile(self, make: Callable[..., Callable], *key: Any) -> Callable[..., Array]:
        return _kept(self.program, make, *key) if self.model.cacheable else make(*key)

    def _logits(self) -> np.ndarray:
        """The model's logits ``[B, C]``, after a check that examples do not change each other's.

        A model in train mode (batch statistics, dropout) would be bounded as it is on a batch of
        one, which is another function; batch normalisation even makes that one constant.
        """
        function = self._compile(_make_logits, self.model.apply)
        x = self.x if len(self.x) > 1 else np.concatenate([self.x, np.zeros_like(self.x)])
        size = max(2, self.batch_size)
        results = []
        for start in range(0, len(x), size):
            index = np.minimum(np.arange(start, start + size), len(x) - 1)
            results.append(np.asarray(function(self.model.variables, jnp.asarray(x[index]))))
        together, alone = np.concatenate(results, axis=1)[:, : len(self.x)]
        # Rounding depends on the batch size; what mixes examples changes far more.
        tolerance = 1e-3 * (1.0 + np.abs(alone).max(initial=0.0, where=np.isfinite(alone)))
        apart = ~np.isclose(together, alone, rtol=0.0, atol=tolerance, equal_nan=True).all(axis=-1)
        if apart.any():
            raise ValueError(
                "model must treat the examples of a batch independently, but the logits of "
                f"example {np.argmax(apart)} change when it is alone; use eval mode "
                "(running averages, no dropout)"
            )
        return alone

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

    def run(self, eps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``verified [B]`` and ``margins [B, C]`` for a radius that broadcasts to ``x``."""
        methods = _IN_BEST if self.method == _BEST else (self.method,)
        bounds = []
        for name in methods:
            eps = np.broadcast_to(eps, (self.x.shape[0], *eps.shape[1:]))
            if name not in self.compiled:
                max_bytes = max(1, self.max_bytes // self.batch_size)
                key = (self.model.apply, name, self.num_classes, self.norm, max_bytes)
                # A transform hides its options from the cache, whose keys must tell all.
                make = self._compile if isinstance(name, str) else lambda make, *key: make(*key)
                self.compiled[name] = make(_make_margins, *key)
            bounds.append(self._map(self.compiled[name], (eps, self.labels)))
        # fmax: a method that failed numerically (NaN) does not spoil the others' sound bounds.
        margins = functools.reduce(np.fmax, bounds)
        others = np.arange(self.num_classes)[None] != self.labels[:, None]
        # With one class nothing can change, but a NaN logit still must not certify; nor do logits
        # that overflow, whatever side they are on.
        verified = (np.where(others, margins > 0, True) & np.isfinite(margins)).all(axis=-1)
        return verified, margins

    def _map(self, function: Callable[..., Array], others: tuple[np.ndarray, ...]) -> np.ndarray:
        """Applies a compiled function to batches of equal size; the last one is filled up."""
        size, total = self.batch_size, self.x.shape[0]
        results = []
        for start in range(0, total, size):
            index = np.minimum(np.arange(start, start + size), total - 1)
            batch = [jnp.asarray(a[index]) for a in (self.x, *others)]
            results.append(np.asarray(function(self.model.variables, self.clip, *batch)))
        return np.concatenate(results)[:total]


def _traced(model: models.PureModel, x: np.ndarray) -> tuple[int, Hashable]:
    """The number of logits, and the key of what the model computes now."""
    program, shape = graph.program(
        model.apply, model.variables, jax.ShapeDtypeStruct(x.shape, x.dtype)
    )
    if not hasattr(shape, "shape") or len(shape.shape) != 2 or shape.shape[0] != x.shape[0]:
        got = getattr(shape, "shape", type(shape).__name__)
        raise ValueError(
            f"model must return logits [B, C] with B = {x.shape[0]} for x of shape {x.shape}, "
            f"got {got}"
        )
    if shape.shape[1] == 0:
        raise ValueError("model must return at least one logit per example, got 0")
    return shape.shape[1], program


def _per_example(eps: Numeric, x: np.ndarray) -> np.ndarray:
    """The radius with as many dimensions as ``x``: scalar, ``[B]``, or broadcastable to ``x``."""
    eps = np.asarray(eps, dtype=x.dtype)
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


def _single(apply: Callable[[ArrayTree, Array], Array], variables: ArrayTree) -> Callable:
    """The model as a function of one example."""
    return lambda x: apply(variables, x[None])[0]


def _make_logits(apply: Callable) -> Callable[..., Array]:
    """Compiles ``(variables, xs) -> [2, B, C]``: the logits of the batch, and one by one."""

    def logits(variables: ArrayTree, xs: Array) -> Array:
        return jnp.stack([apply(variables, xs), jax.vmap(_single(apply, variables))(xs)])

    return jax.jit(logits)


def _name(method: str | Transform) -> str:
    """A method's name for the certificate: ``linear(slopes='parallel')`` for a partial."""
    if isinstance(method, str):
        return method
    if isinstance(method, functools.partial):
        options = [*map(repr, method.args), *(f"{k}={v!r}" for k, v in method.keywords.items())]
        return f"{_name(method.func)}({', '.join(options)})"
    return getattr(method, "__name__", type(method).__name__)


def _make_margins(
    apply: Callable, method: str | Transform, num_classes: int, norm: float, max_bytes: int
) -> Callable[..., Array]:
    """Compiles ``(variables, clip, xs, eps, labels) -> margins [B, C]`` for one method."""

    def margins(variables: ArrayTree, clip: Any, xs: Array, eps: Array, labels: Array) -> Array:
        single = _single(apply, variables)
        transformed = (
            METHODS[method](single, max_bytes) if isinstance(method, str) else method(single)
        )

        def bounds(ball: LpBall, specification: Array) -> Interval:
            found = transformed(ball, specification)
            if not isinstance(found, Interval):
                raise TypeError(
                    f"method must give bounds, an Interval, but {_name(method)} returned "
                    f"{type(found).__name__}; an estimate or a pair with aux certifies nothing"
                )
            return found

        def one(x: Array, radius: Array, label: Array) -> Array:
            if num_classes == 1:  # no margin to bound; pass a NaN logit on
                return 0.0 * bounds(LpBall(x, radius, norm, clip), jnp.ones((1, 1), x.dtype)).lower
            specification = margin_specification(label, num_classes, dtype=x.dtype)
            lower = bounds(LpBall(x, radius, norm, clip), specification).lower
            steps = jnp.arange(1, num_classes, dtype=label.dtype)
            others = (label + steps) % num_classes
            return jnp.zeros((num_classes,), lower.dtype).at[others].set(lower)

        return jax.vmap(one)(xs, eps, labels)

    return jax.jit(margins)


@functools.lru_cache(maxsize=32)
def _kept(program: Hashable, make: Callable[..., Callable], *key: Any) -> Callable[..., Array]:
    """Compiled code of an earlier call, for the same program only."""
    del program
    return make(*key)
