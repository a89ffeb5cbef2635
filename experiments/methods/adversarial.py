"""Training on attacked images: PGD, and between attack and bounds SABR, TAPS, expressive losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import boundjax as bj
from boundjax import training
from boundjax.attacks import pgd
from experiments.methods.bounded import Bounded, Example, interval_bound, no_certificate
from experiments.methods.certified import Attack
from experiments.methods.method import Setting, Weights


def attack_of(setting: Setting) -> Attack:
    """PGD on the cross-entropy, as `config.adversary` says; the first start is the image itself.

    Batch normalisation takes the statistics of the clean batch, as the bounds do.
    """
    adversary, threat = setting.config.adversary, setting.threat

    def attack(logits_of, batch, weights, key) -> jax.Array:
        eps = adversary.scale * weights.eps
        return jax.lax.stop_gradient(
            pgd(
                logits_of,
                batch.images,
                batch.labels,
                eps,
                key=key,
                norm=threat.norm,
                clip=threat.clip,
                steps=adversary.steps,
                step_size=adversary.step_size * eps,
                restarts=adversary.restarts,
                loss="cross_entropy",
            )
        )

    return attack


def pgd_bound(setting: Setting):
    """Cross-entropy of the attacked image (Madry et al. 2018): certifies nothing.

    The interval bounds are there for the regularizers, ReLU stability in particular.
    """

    def bound(function, ball, rows, weights, example) -> Bounded:
        found = interval_bound(function, ball, rows, weights, example)
        attacked = training.robust_cross_entropy(rows @ function(example.attacked))
        return found._replace(robust_loss=attacked)

    return bound


def sabr_bound(setting: Setting):
    """Interval bounds over a small box around the attacked image (Mueller et al. 2023, SABR)."""

    def bound(function, ball, rows, weights, example) -> Bounded:
        box = _small_box(setting, weights, example)
        found = interval_bound(function, box, rows, weights, example)
        return found._replace(verified=no_certificate(found.verified))

    return bound


def _small_box(setting: Setting, weights: Weights, example: Example) -> bj.Box:
    # Of the clipped ball, as in the authors' code.
    return training.small_box(
        example.attacked,
        example.image,
        weights.eps,
        setting.config.adversary.box,
        setting.threat.clip,
        of_clipped=True,
    )


def expressive_bound(setting: Setting, name: str):
    """Between attack and interval bounds, by `alpha` (De Palma et al. 2024, expressive losses).

    Args:
      setting: model and configuration.
      name: `"mtl-ibp"`, a sum of the two losses; `"exp-ibp"`, a product of powers; `"cc-ibp"`, the
        loss of a sum of the two margins.
    """
    alpha = setting.config.adversary.alpha

    def bound(function, ball, rows, weights, example) -> Bounded:
        found = interval_bound(function, ball, rows, weights, example)
        attacked = rows @ function(example.attacked)
        if name == "cc-ibp":
            margins = training.cc_ibp_margins(attacked, found.verified, alpha)
            return found._replace(robust_loss=training.robust_cross_entropy(margins))
        combine = training.mtl_ibp_loss if name == "mtl-ibp" else training.exp_ibp_loss
        loss = combine(training.robust_cross_entropy(attacked), found.robust_loss, alpha)
        return found._replace(robust_loss=loss)

    return bound


def taps_bound(setting: Setting, *, small: bool):
    """Intervals through the first block, an attack through the others (Mao et al. 2023, TAPS).

    One latent attack per margin, in the box that intervals give; gradients reach the box through
    the rectified link. The loss is the product of this one and the interval one.

    Args:
      setting: model and configuration; the model has `start` and `stop`.
      small: over SABR's box instead of the whole ball (STAPS).
    """
    adversary = setting.config.adversary

    def bound(function, ball, rows, weights, example) -> Bounded:
        propagated = ball
        if small:
            propagated = _small_box(setting, weights, example)
        found = interval_bound(function, propagated, rows, weights, example)
        first, rest = function.blocks(adversary.split)
        latent = bj.interval(first)(propagated)
        points = latent_attack(rest, latent, rows, example.key, adversary)
        linked = jax.vmap(training.rectified_link, in_axes=(0, None, None))(
            points, latent.lower, latent.upper
        )
        margins = jnp.sum(rows * jax.vmap(rest)(linked), axis=-1)
        loss = training.scaled_product(
            found.robust_loss, training.robust_cross_entropy(margins), adversary.taps_scale
        )
        verified = no_certificate(found.verified) if small else found.verified
        return found._replace(robust_loss=loss, verified=verified)

    return bound


def latent_attack(rest, box: bj.Interval, rows: jax.Array, key: jax.Array, adversary) -> jax.Array:
    """For every margin the point of the box `[m, *latent]` where an attack makes it least.

    From a random point, along signed gradients of `step_size` times the box's width.
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
