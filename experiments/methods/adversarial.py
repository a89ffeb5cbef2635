"""Training on attacked images: PGD, and SABR, TAPS, expressive losses between attack and bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

import boundjax as bj
from boundjax import training
from boundjax.attacks import pgd
from experiments.methods.bounded import Bound, Bounded, Example, interval_bound, no_certificate
from experiments.methods.certified import Attack
from experiments.methods.method import Coefficients, Setting
from experiments.settings.config import AdversaryConfig


def attack_of(setting: Setting) -> Attack:
    """Creates PGD on the cross-entropy with `config.adversary`; its first start is the image.

    Batch normalisation uses the statistics of the clean batch, as the bounds do.
    """
    adversary, norm, clip = setting.config.adversary, setting.threat.norm, setting.clip

    def attack(logits_of, batch, coefficients, key) -> jax.Array:
        eps = adversary.scale * coefficients.eps
        return jax.lax.stop_gradient(
            pgd(
                logits_of,
                batch.images,
                batch.labels,
                eps,
                key=key,
                norm=norm,
                clip=clip,
                steps=adversary.steps,
                step_size=adversary.step_size * eps,
                restarts=adversary.restarts,
                loss="cross_entropy",
            )
        )

    return attack


def pgd_bound(setting: Setting) -> Bound:
    """Takes the cross-entropy of the attacked image (Madry et al. 2018); certifies nothing.

    The regularizers, ReLU stability in particular, read the interval bounds.
    """

    def bound(function, ball, rows, coefficients, example) -> Bounded:
        bounds = interval_bound(function, ball, rows, coefficients, example)
        attacked = training.robust_cross_entropy(rows @ function(example.attacked))
        return bounds._replace(robust_loss=attacked)

    return bound


def sabr_bound(setting: Setting) -> Bound:
    """Propagates a small box around the attacked image (Mueller et al. 2023, SABR)."""

    def bound(function, ball, rows, coefficients, example) -> Bounded:
        box = _small_box(setting, coefficients, example)
        bounds = interval_bound(function, box, rows, coefficients, example)
        return bounds._replace(verified=no_certificate(bounds.verified))

    return bound


def _small_box(setting: Setting, coefficients: Coefficients, example: Example) -> bj.Box:
    # The box lies in the clipped ball, as in the authors' code.
    return training.small_box(
        example.attacked,
        example.image,
        coefficients.eps,
        setting.config.adversary.box,
        setting.clip,
        of_clipped=True,
    )


Expressive = Literal["mtl-ibp", "exp-ibp", "cc-ibp"]


def expressive_bound(setting: Setting, name: Expressive) -> Bound:
    """Mixes attack and interval bounds by `alpha` (De Palma et al. 2024, expressive losses).

    Args:
      setting: model and configuration.
      name: `"mtl-ibp"`, a sum of the two losses; `"exp-ibp"`, a product of powers; `"cc-ibp"`, the
        loss of a sum of the two margins.
    """
    alpha = setting.config.adversary.alpha

    def bound(function, ball, rows, coefficients, example) -> Bounded:
        bounds = interval_bound(function, ball, rows, coefficients, example)
        attacked = rows @ function(example.attacked)
        if name == "cc-ibp":
            margins = training.cc_ibp_margins(attacked, bounds.verified, alpha)
            return bounds._replace(robust_loss=training.robust_cross_entropy(margins))
        combine = training.mtl_ibp_loss if name == "mtl-ibp" else training.exp_ibp_loss
        loss = combine(training.robust_cross_entropy(attacked), bounds.robust_loss, alpha)
        return bounds._replace(robust_loss=loss)

    return bound


def taps_bound(setting: Setting, *, small: bool) -> Bound:
    """Propagates through the first block, attacks through the rest (Mao et al. 2023, TAPS).

    Each margin gets one latent attack, in the box that intervals give; gradients reach the box
    through the rectified link. The loss is the product of this loss and the interval loss.

    Args:
      setting: model and configuration; the model's `__call__` takes `start` and `stop`.
      small: propagate SABR's box instead of the whole ball (STAPS).
    """
    adversary = setting.config.adversary

    def bound(function, ball, rows, coefficients, example) -> Bounded:
        propagated = _small_box(setting, coefficients, example) if small else ball
        bounds = interval_bound(function, propagated, rows, coefficients, example)
        first, rest = function.blocks(adversary.split)
        latent = bj.interval(first)(propagated)
        points = latent_attack(rest, latent, rows, example.key, adversary)
        linked = jax.vmap(training.rectified_link, in_axes=(0, None, None))(
            points, latent.lower, latent.upper
        )
        margins = jnp.sum(rows * jax.vmap(rest)(linked), axis=-1)
        loss = training.scaled_product(
            bounds.robust_loss, training.robust_cross_entropy(margins), adversary.taps_scale
        )
        verified = no_certificate(bounds.verified) if small else bounds.verified
        return bounds._replace(robust_loss=loss, verified=verified)

    return bound


def latent_attack(
    rest: Callable[[jax.Array], jax.Array],
    box: bj.Interval,
    rows: jax.Array,
    key: jax.Array,
    adversary: AdversaryConfig,
) -> jax.Array:
    """Searches, for every margin, the point of the box that minimises it: `[m, *latent]`.

    Each attack starts at a random point and takes signed gradient steps of `step_size` times the
    box's width.
    """
    box = jax.lax.stop_gradient(box)
    width = box.upper - box.lower

    def attack(row: jax.Array, key: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda point: row @ rest(point))

        def step(point: jax.Array, _: None) -> tuple[jax.Array, None]:
            moved = point - adversary.step_size * width * jnp.sign(gradient(point))
            return jnp.clip(moved, box.lower, box.upper), None

        start = box.lower + width * jax.random.uniform(key, width.shape, width.dtype)
        return jax.lax.scan(step, start, length=adversary.steps)[0]

    keys = jax.random.split(key, len(rows))
    return jax.lax.stop_gradient(jax.vmap(attack)(rows, keys))
