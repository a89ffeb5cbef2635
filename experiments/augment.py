"""Random variations of training images, on the device: pure functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

PADDING = 4  # pixels on every side, as all papers have it for images of 32x32
# Apart from the key of the initial parameters, which is the seed's own.
_STREAM = 2


def flip_and_crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image mirrored with probability 1/2, padded with zeros and cut at a random place.

    Args:
      key: PRNG key.
      images: `[B, H, W, channels]`.

    Returns:
      The same shape. One draw per image, whatever devices the batch lies on.
    """
    flip_key, place_key = jax.random.split(key)
    mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    images = jnp.where(mirrored, images[:, :, ::-1], images)
    places = jax.random.randint(place_key, (len(images), 2), 0, 2 * PADDING + 1)
    padded = jnp.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))

    def cut(image: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (place[0], place[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, places)


def create_augmentation(name: str, seed: int) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """`(step, images) -> images` for `config.train.augment`; None where images stay as they are."""
    if name == "none":
        return None
    key = jax.random.fold_in(jax.random.key(seed), _STREAM)
    return lambda step, images: flip_and_crop(jax.random.fold_in(key, step), images)
