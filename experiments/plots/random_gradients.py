"""Measures of the gradients and the robustness of random networks, for their figures.

A network is a function `(x, key) -> logits`; a deterministic one ignores the key, so its draws are
all alike. Gradients are those of the cross-entropy with respect to the input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

import boundjax as bj
from boundjax.attacks import expected_gradient, pgd, transfer_accuracy
from boundjax.stochastic import each_draw, mean_softmax
from boundjax.training import cross_entropy, gradient_directions
from boundjax.training.gradient_diversity import concentration

# (x [B, ...], key) -> logits [B, C].
Function = Callable[[Array, Array], Array]


class Sample(NamedTuple):
    """A random network and the images to measure it on.

    Attributes:
      function: the network.
      x, labels: images `[B, ...]` and their classes.
      threat: radius, norm and clipping of the attacks.
      key: of all draws.
    """

    function: Function
    x: Float[Array, "B ..."]
    labels: Int[Array, " B"]
    threat: bj.Threat
    key: Array


def gradients(sample: Sample, draws: int) -> Float[Array, "n B ..."]:
    """The gradients of `draws` draws."""

    @jax.jit
    def of_draws(x: Array, labels: Array, keys: Array) -> Array:
        def loss(x: Array, key: Array) -> Array:
            return jnp.sum(cross_entropy(sample.function(x, key), labels))

        return each_draw(lambda key: jax.grad(loss)(x, key), keys)

    return of_draws(sample.x, sample.labels, jax.random.split(sample.key, draws))


def cosines(sample: Sample, draws: int) -> np.ndarray:
    """The cosines `[B, n, n]` of the gradients of every image (Figure 2.9 of the thesis)."""
    return np.asarray(gradient_directions(gradients(sample, draws)).cosines)


def concentrations(sample: Sample, draws: int) -> np.ndarray:
    """The estimates `kappa` `[B]` of von Mises-Fisher distributions (Figure 2.6)."""
    directions = gradient_directions(gradients(sample, draws))
    values = directions.size * concentration(directions.cosines, directions.size)
    return np.asarray(values)[np.asarray(directions.kept)]


class Plane(NamedTuple):
    """Unit gradients of one image on a plane: `[n, 2]` for each network, and their means `[2]`."""

    points: list[np.ndarray]
    means: list[np.ndarray]
    rho: list[float]


def on_the_plane(samples: Sequence[Sample], draws: int) -> Plane:
    """Projects gradients of the first image on the plane of the means of the first two networks.

    With one network the second axis is the principal one of what its mean leaves (Figure 2.4).
    """
    units = []
    for sample in samples:
        first = sample._replace(x=sample.x[:1], labels=sample.labels[:1])
        flat = np.asarray(gradients(first, draws)).reshape(draws, -1).astype(np.float64)
        units.append(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12))
    means = [np.mean(each, axis=0) for each in units]
    one = means[0] / max(float(np.linalg.norm(means[0])), 1e-12)
    if len(means) > 1:
        rest = means[1] - (means[1] @ one) * one
    else:
        left = units[0] - np.outer(units[0] @ one, one)
        rest = np.linalg.svd(left, full_matrices=False)[2][0]
    basis = np.stack([one, rest / max(float(np.linalg.norm(rest)), 1e-12)], axis=1)
    return Plane(
        [each @ basis for each in units],
        [mean @ basis for mean in means],
        [float(np.linalg.norm(mean)) for mean in means],
    )


def _clip(sample: Sample) -> tuple[float, float] | None:
    clip: Any = sample.threat.clip
    return None if clip is None else (float(clip[0]), float(clip[1]))


def _attack(sample: Sample, draws: int, steps: int) -> Callable[[Any], Array]:
    """EOT-PGD as a function of the radius, which is compiled once."""
    attack = functools.partial(
        pgd,
        sample.function,
        norm=sample.threat.norm,
        clip=_clip(sample),
        steps=steps,
        loss="cross_entropy",
        draws=draws,
    )
    compiled = jax.jit(attack)
    return lambda eps: compiled(sample.x, sample.labels, jnp.float32(eps), key=sample.key)


def loss_increases(sample: Sample, draws: int, steps: int) -> np.ndarray:
    """How much EOT-PGD increases the mean loss of every image `[B]` (Figure 2.5)."""
    moved = _attack(sample, draws, steps)(sample.threat.eps)
    keys = jax.random.split(jax.random.fold_in(sample.key, 1), draws)

    @jax.jit
    def loss(x: Array) -> Array:
        each = each_draw(lambda key: cross_entropy(sample.function(x, key), sample.labels), keys)
        return jnp.mean(each, axis=0)

    return np.asarray(loss(moved) - loss(sample.x))


def accuracies(
    sample: Sample, radii: Sequence[float], draws: int, steps: int, predicted_by: int = 20
) -> list[float]:
    """Accuracies under EOT-PGD at several radii (Figures 2.7, A.2 and A.5).

    Args:
      sample: the network.
      radii: of the attacks.
      draws: per gradient of the attack.
      steps: of the attack.
      predicted_by: draws of the mean softmax that predicts.
    """
    key = jax.random.fold_in(sample.key, 2)

    @jax.jit
    def accuracy(x: Array) -> Array:
        mean = mean_softmax(sample.function, x, key, predicted_by)
        return jnp.mean(jnp.argmax(mean, axis=-1) == sample.labels)

    attack = _attack(sample, draws, steps)
    return [float(accuracy(sample.x if eps == 0 else attack(eps))) for eps in radii]


def transfers(sample: Sample, draws: int, steps: int) -> np.ndarray:
    """The accuracy `[n, n]` of every draw on the attacks on every other draw (Figure 2.8)."""
    attack = functools.partial(
        pgd,
        eps=sample.threat.eps,
        norm=sample.threat.norm,
        clip=_clip(sample),
        steps=steps,
        loss="cross_entropy",
    )
    return np.asarray(
        transfer_accuracy(
            sample.function, sample.x, sample.labels, attack, key=sample.key, draws=draws
        )
    )


def rotated(gradient: Float[Array, "B ..."], angle: Array, key: Array) -> Float[Array, "B ..."]:
    """Rotates every example's gradient by an angle towards a random direction; norms stay."""
    flat = gradient.reshape(gradient.shape[0], -1)
    norm = jnp.linalg.norm(flat, axis=1, keepdims=True)
    unit = flat / jnp.maximum(norm, 1e-12)
    noise = jax.random.normal(key, flat.shape, flat.dtype)
    side = noise - jnp.sum(noise * unit, axis=1, keepdims=True) * unit
    side = side / jnp.maximum(jnp.linalg.norm(side, axis=1, keepdims=True), 1e-12)
    return (norm * (jnp.cos(angle) * unit + jnp.sin(angle) * side)).reshape(gradient.shape)


class Proxy(NamedTuple):
    """What PGD with rotated gradients reaches, by the angle in degrees."""

    angles: list[float]
    increases: list[float]
    accuracies: list[float]


def proxy_attacks(sample: Sample, angles: Sequence[float], draws: int, steps: int) -> Proxy:
    """Attacks with gradients that are rotated about a random axis at every step (Figure 2.2)."""
    threat = sample.threat
    size = threat.eps / 4

    @jax.jit
    def attacked(angle: Array) -> tuple[Array, Array]:
        def step(x: Array, key: Array) -> tuple[Array, None]:
            draw, axis = jax.random.split(key)
            gradient = expected_gradient(sample.function, x, sample.labels, key=draw, draws=draws)
            direction = rotated(gradient, angle, axis)
            if threat.norm == np.inf:
                direction = jnp.sign(direction)
            else:
                flat = direction.reshape(len(x), -1)
                norm = jnp.maximum(jnp.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
                direction = (flat / norm).reshape(direction.shape)
            return jax.vmap(threat.project)(x + size * direction, sample.x), None

        moved, _ = jax.lax.scan(step, sample.x, jax.random.split(sample.key, steps))
        keys = jax.random.split(jax.random.fold_in(sample.key, 1), draws)

        def losses(x: Array) -> Array:
            return jnp.mean(
                each_draw(lambda key: cross_entropy(sample.function(x, key), sample.labels), keys)
            )

        mean = mean_softmax(sample.function, moved, keys[0], draws)
        right = jnp.mean(jnp.argmax(mean, axis=-1) == sample.labels)
        return losses(moved) - losses(sample.x), right

    results = [attacked(jnp.deg2rad(jnp.float32(angle))) for angle in angles]
    return Proxy(
        list(map(float, angles)),
        [float(increase) for increase, _ in results],
        [float(right) for _, right in results],
    )
