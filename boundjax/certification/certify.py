"""Certificates for a model and a batch: which predictions cannot change within a radius."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from boundjax.certification import complete
from boundjax.certification.certificate import Certificate
from boundjax.certification.memory import MemoryEstimate, available_bytes
from boundjax.certification.presets import COMPLETE, Method, Transform, name_of
from boundjax.certification.progress import Progress, Steps, told
from boundjax.certification.proof import with_proof
from boundjax.certification.request import Request
from boundjax.sets import rounding as rounding_of_sets
from boundjax.sets.checks import first_index
from boundjax.sets.rounding import Rounding
from boundjax.sets.threat import Threat
from boundjax.typing import Device, PyTree


def certify(
    model: Any,
    x: Float[ArrayLike, "B ..."],
    eps: ArrayLike,
    *,
    labels: Int[ArrayLike, "B ..."] | None = None,
    constants: PyTree = None,
    call: Mapping[str, Any] | None = None,
    output: Callable[[Any], Array] | None = None,
    norm: float = jnp.inf,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    method: Method | Transform = "crown-ibp",
    rounding: Rounding | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    devices: Sequence[Device] | None = None,
    timeout: float | None = None,
    progress: Progress | bool = False,
) -> Certificate:
    """Certifies that a classifier's decision cannot change within a radius.

    Args:
      model: logits `[B, C]` from a batch `[B, ...]`: a bound Linen module,
        `(module, variables)`, an NNX module (used in eval mode, its state left alone), a
        `functools.partial` such as `partial(module.apply, variables, train=False)`, a callable
        pytree, or any callable; see `PureModel.of`. It is bounded one example at a time, so it must
        not mix examples. A model that classifies every position of an example (pixels, tokens)
        returns `[B, ..., C]`; every position is certified for changes of the whole example. A
        random network is certified for fixed draws, see `PureModel.fixed_draw` and
        `PureModel.mean_softmax`.
      x: the inputs `[B, ...]`, float32 or float64. Without x64 JAX computes in float32, and float64
        inputs that float32 does not hold are refused.
      eps: the radius in the units of `x` (8 / 255 for pixels in [0, 1]), `>= 0`: a scalar, one per
        example `[B]`, or one per feature (an array that broadcasts to `x`, with as many
        dimensions). The radius and the ends `x - eps`, `x + eps` are rounded outwards where they
        are inexact; a radius of 0 is the point itself.
      labels: classes `[B]`, or `[B, ...]` for every position; by default the model's own
        predictions.
      constants: a pytree of arrays `[B, ...]` that the model takes as its second argument, such as
        lengths, masks or conditions: one entry for each example, not perturbed.
      call: keywords of every call of the model, such as `{"train": False}`.
      output: picks the logits from what the model returns, as in `lambda y: y[0]`.
      norm: order p of the norm, 1, 2 or inf.
      clip: `(low, high)`, the range of valid inputs, or None; `x` must lie in it.
      method: `"interval"`, `"crown-ibp"`, `"one-step"` (one signed gradient step on the
        slopes), `"crown"`, `"fast-lin"` (exact CAP), or `"best"`: per margin the largest of
        all these lower bounds; `"alpha-crown"` (20 steps, intermediate bounds too: much slower);
        `"bcp"` (l2 ball and box together, part of `"best"` for norms other than inf) or
        `"lmt"` (Lipschitz constants alone), with provable bounds on spectral norms; `"complete"`:
        `"crown-ibp"`, then `"crown"`, and for every example that they leave open a search that
        splits the box or the units of piecewise linear ops and looks for a counterexample (norm
        inf and float32 only);
        or a transform such as `functools.partial(boundjax.linear, slopes="parallel")`, which turns
        a function of one example into a function `(input_set, specification) -> Interval`.
      rounding: what the certificate is to hold for: `"real"`, the network in real arithmetic;
        `"float32"`, also every execution of it in the floating-point arithmetic of `x`;
        `"nearest"`, the network in real arithmetic up to the rounding of the bounds, which is what
        bounds in training are. By default `"real"`, or with a warning `"nearest"` where an op or
        the device has no proof. A transform states its own, as in
        `functools.partial(boundjax.linear, rounding="real")`.
      batch_size: examples per compiled call, on all devices together; by default as many as fit.
        Results do not depend on it.
      max_bytes: the most memory that one call may take on a device (see `memory_estimate`); by
        default three quarters of the free memory.
      devices: local devices, such as `jax.local_devices()`, that divide every batch; by default
        JAX's default device. They do not communicate, and their number changes results only by the
        rounding of the compiled code; the searches of `"complete"`, one after the other, divide
        their domains over all of them.
      timeout: seconds for the search of one example with `"complete"`, 60 by default; compilation
        does not count.
      progress: True draws a bar on stderr while that is a terminal; a callback is called as
        `progress(done, total, undecided)` after every batch and every search, see `Progress`, for a
        log line, a bar of your own, or an exception that stops the call.

    Returns:
      A `Certificate`; with `"complete"` its `falsified` and `undecided` tell apart the examples
      that are not verified.

    Raises:
      ValueError: for an empty batch, NaN inputs, a negative or NaN radius, labels out of range,
        wrong shapes, fewer than two logits, a model that mixes examples, is in train mode, takes
        one example instead of a batch, or draws random numbers for every query, several positions
        with `"complete"`, an unknown method or rounding, weights without a spectral norm, or
        devices of another process.
      TypeError: for a model that cannot be called, inputs that are neither float32 nor float64 or
        would be rounded, or a transform that does not return an `Interval` (an `Estimate` is not a
        bound).
      MemoryError: before anything is computed, if a call does not fit; the message names a batch
        size that does.
      UnsupportedOpError: at an op that is not in `supported_ops()`.
      NoProofError: if an op or the device has no proof for the `rounding` that was asked for.
    """
    threat, limit = Threat(eps, norm, clip), _checked_timeout(timeout, method)

    def attempt(rounding: Rounding) -> Certificate:
        request = Request.check(
            model,
            x,
            threat,
            labels,
            method,
            rounding,
            batch_size,
            max_bytes,
            devices,
            constants=constants,
            call=call,
            output=output,
            progress=callback,
        )
        points: dict[int, np.ndarray] = {}
        if method == COMPLETE:
            verified, margins, points = complete.answered(request, threat, limit, devices)
        else:
            verified, margins = request.run(request.eps)
        return Certificate(
            verified,
            margins,
            request.labels,
            threat,
            name_of(method),
            request.arithmetic,
            points,
            has_constants=bool(request.constants),
        )

    with told(progress) as callback:
        return with_proof(rounding, method, attempt)


def _checked_timeout(timeout: float | None, method: Method | Transform) -> float:
    if timeout is None:
        return complete.DEFAULT_TIMEOUT
    if method != COMPLETE:
        raise ValueError(f"timeout is for method='complete', got method={name_of(method)!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be positive, in seconds, got {timeout}")
    return float(timeout)


def _refuse_complete(method: Method | Transform, name: str) -> None:
    if method == COMPLETE:
        raise ValueError(
            f"{name} takes every method but 'complete', whose searches depend on the example; "
            "use 'crown'"
        )


def memory_estimate(
    model: Any,
    x: Float[ArrayLike, "B ..."],
    method: Method | Transform = "crown-ibp",
    *,
    constants: PyTree = None,
    call: Mapping[str, Any] | None = None,
    output: Callable[[Any], Array] | None = None,
    norm: float = jnp.inf,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    rounding: Rounding | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    devices: Sequence[Device] | None = None,
) -> MemoryEstimate:
    """Peak memory of `certify` with the same arguments, without bounding anything.

    Compiles the program that `certify` will run and asks the compiler. For `"best"` it is the
    largest peak of its methods.

    Args:
      model, x, method, constants, call, output, norm, clip, rounding, batch_size, max_bytes,
        devices: as for `certify`.

    Returns:
      A `MemoryEstimate`, for the batch size that `certify` would choose.

    Raises:
      ValueError, TypeError, MemoryError, UnsupportedOpError, NoProofError: as `certify`.
    """
    _refuse_complete(method, "memory_estimate")
    threat = Threat(0.0, norm, clip)

    def attempt(rounding: Rounding) -> MemoryEstimate:
        request = Request.check(
            model,
            x,
            threat,
            None,
            method,
            rounding,
            batch_size,
            max_bytes,
            devices,
            constants=constants,
            call=call,
            output=output,
        )
        plans = [request.plan(name) for name in request.methods]
        largest = max(plans, key=lambda plan: plan.peak)
        return MemoryEstimate(largest.peak, largest.batch_size, available_bytes(request.devices))

    return with_proof(rounding, method, attempt)


def certified_radius(
    model: Any,
    x: Float[ArrayLike, "B ..."],
    *,
    labels: Int[ArrayLike, "B ..."] | None = None,
    constants: PyTree = None,
    call: Mapping[str, Any] | None = None,
    output: Callable[[Any], Array] | None = None,
    norm: float = jnp.inf,
    clip: tuple[ArrayLike, ArrayLike] | None = None,
    method: Method | Transform = "crown-ibp",
    rounding: Rounding | None = None,
    pattern: ArrayLike | None = None,
    eps_max: float = 1.0,
    steps: int = 12,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    devices: Sequence[Device] | None = None,
    progress: Progress | bool = False,
) -> Float[np.ndarray, " B"]:
    """The largest radius within which each example is certified, by bisection up to `eps_max`.

    Args:
      model, x, labels, constants, call, output, norm, clip, method, rounding, batch_size,
        max_bytes, devices, progress: as for `certify`.
      pattern: nonnegative weights that broadcast to `x`, such as `[*shape]` for all examples; the
        radius of a feature is its weight times the answer, rounded up. 1 on a patch and 0 elsewhere
        asks how much the patch may change; weights in the units of the features make the answer a
        factor without units. By default 1 everywhere.
      eps_max: the largest radius to try, in the units of `x`; with a pattern the largest factor.
      steps: number of halvings; the result is within `eps_max / 2 ** steps` of what the bounds can
        prove.

    Returns:
      `[B]`; radii at which `certify` succeeded, with a pattern factors of it, and for a model with
        several positions at all of them. 0 where every radius that was tried failed, as for
        misclassified examples.

    Raises:
      ValueError, TypeError, UnsupportedOpError, NoProofError: as `certify`; ValueError also for
        `steps < 1`, and a pattern that is negative, not finite, or does not broadcast to `x`.
    """
    _refuse_complete(method, "certified_radius")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if np.ndim(eps_max) != 0:
        raise ValueError(f"eps_max must be a scalar, got shape {np.shape(eps_max)}")
    threat = Threat(eps_max, norm, clip)
    weights = None if pattern is None else _checked_pattern(pattern, np.shape(x))

    def attempt(rounding: Rounding) -> np.ndarray:
        request = Request.check(
            model,
            x,
            threat,
            labels,
            method,
            rounding,
            batch_size,
            max_bytes,
            devices,
            constants=constants,
            call=call,
            output=output,
            progress=callback,
        )
        return _largest_radii(request, steps, weights)

    with told(progress) as callback:
        return with_proof(rounding, method, attempt)


def _checked_pattern(pattern: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """A pattern with as many dimensions as `x`, float64.

    Raises:
      ValueError: for a weight that is negative or not finite, or a shape that does not broadcast.
    """
    weights = np.asarray(pattern).astype(np.float64)
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        raise ValueError(
            f"pattern must be finite and >= 0, got {weights[bad].flat[0]}{first_index(bad)}"
        )
    weights = weights.reshape((1,) * (len(shape) - weights.ndim) + weights.shape)
    fits = weights.ndim == len(shape) and all(
        w in (1, n) for w, n in zip(weights.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"pattern must broadcast to x of shape {shape}, got shape {np.shape(pattern)}; one "
            f"weight per feature is {shape[1:]}"
        )
    return weights


def _largest_radii(request: Request, steps: int, weights: np.ndarray | None) -> np.ndarray:
    """Bisects the radius of every example `[B]` between 0 and the radius of the request."""
    shape = (request.x.shape[0],) + (1,) * (request.x.ndim - 1)
    high = request.eps.reshape(shape[0], -1)[:, 0]
    if weights is not None:  # the shape for which the request compiles
        request = dataclasses.replace(request, eps=_weighted(high.reshape(shape), weights))
    examples = len(request.x)
    total = (steps + 1) * len(request.methods) * examples
    counted = Steps(request.progress, total, examples)

    def certified(radii: np.ndarray) -> np.ndarray:
        counted.again()
        eps = radii.reshape(shape)
        verified, _ = request.run(eps if weights is None else _weighted(eps, weights), counted)
        return np.asarray(verified.reshape(examples, -1).all(axis=1))

    succeeds = certified(high)
    low = np.where(succeeds, high, np.zeros_like(high))
    for _ in range(steps):
        middle = (0.5 * (low + high)).astype(high.dtype)
        succeeds = certified(middle)
        low = np.where(succeeds, middle, low)
        high = np.where(succeeds, high, middle)
    return low


def _weighted(eps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`eps * weights` in the dtype of `eps`, rounded up where it is inexact."""
    product = eps.astype(np.float64) * weights
    single = np.float32
    if eps.dtype != single or (weights.astype(single) != weights).any():  # else it is exact
        product = np.where(product > 0, np.nextafter(product, np.inf), product)
    # A product of positive numbers that underflows is not 0.
    product = np.where((product == 0) & (eps > 0) & (weights > 0), np.finfo(single).tiny, product)
    return rounding_of_sets.up(product, eps.dtype)
