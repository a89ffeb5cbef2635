"""Random variations of training images, on the device: pure functions of a PRNG key."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.settings.errors import ExperimentError

# What the padding is made of: the mode of `jnp.pad` by the name of the configuration.
BORDERS = {"zeros": "constant", "edge": "edge"}


def mirror(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each of the images `[B, H, W, channels]` with probability 1/2 the other way round."""
    mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_crop(key: jax.Array, images: jax.Array, crop: int, border: str) -> jax.Array:
    """Each image padded by `crop` pixels on every side and cut to its size at a random place.

    Args:
      key: PRNG key.
      images: `[B, H, W, channels]`.
      crop: pixels, below H and W.
      border: `"zeros"` (Lee et al. 2021, Zhang et al. 2020) or `"edge"`, which repeats the
        outermost pixels (Shi et al. 2021).

    Returns:
      The same shape. All `(2 crop + 1)^2` places are equally likely.

    Raises:
      ExperimentError: if a window could lie outside of its image altogether.
    """
    height, width = images.shape[1:3]
    if crop >= min(height, width):
        raise ExperimentError(
            f"config.augment.crop must be below the size of the images, {height}x{width}, "
            f"got {crop}"
        )
    places = jax.random.randint(key, (len(images), 2), 0, 2 * crop + 1)
    padded = jnp.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)), mode=BORDERS[border])

    def cut(image: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (place[0], place[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, places)


def create_augmentation(
    *, flip: bool, crop: int, border: str
) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """`(key, images [B, H, W, channels]) -> images`; None where images stay as they are.

    One draw per image, whatever devices the batch lies on. The draws of one variation do not depend
    on whether the other is on.

    Args:
      flip: whether images are mirrored at random; not for digits, which then are others.
      crop: pixels of padding on every side before a random crop; 0: no crop.
      border: of that padding, `"zeros"` or `"edge"`.

    Raises:
      ExperimentError: for a negative crop or an unknown border.
    """
    if crop < 0:
        raise ExperimentError(f"config.augment.crop must be >= 0 pixels, got {crop}")
    if border not in BORDERS:
        raise ExperimentError(
            f"config.augment.border must be one of {', '.join(BORDERS)}, got {border!r}"
        )
    if not flip and crop == 0:
        return None

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        flip_key, place_key = jax.random.split(key)
        if flip:
            images = mirror(flip_key, images)
        return random_crop(place_key, images, crop, border) if crop else images

    return augment
