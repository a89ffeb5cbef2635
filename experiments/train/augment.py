"""Random variations of training images on the device, as pure functions of a PRNG key."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from experiments.settings.config import Border
from experiments.settings.errors import ExperimentError

# The mode of `jnp.pad` for each border of the configuration.
BORDERS: dict[Border, str] = {"zeros": "constant", "edge": "edge"}


def mirror(key: Array, images: Float[Array, "B H W channels"]) -> Float[Array, "B H W channels"]:
    """Mirrors each image left to right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_crop(
    key: Array, images: Float[Array, "B H W channels"], crop: int, border: Border
) -> Float[Array, "B H W channels"]:
    """Pads each image by `crop` pixels on every side and cuts its size out at a random place.

    Args:
      key: PRNG key.
      images: the images.
      crop: number of pixels, below H and W.
      border: `"zeros"` (Lee et al. 2021, Zhang et al. 2020) or `"edge"`, which repeats the
        outermost pixels (Shi et al. 2021).

    Returns:
      The cropped images; all `(2 crop + 1)^2` places are equally likely.

    Raises:
      ExperimentError: if a window could lie entirely outside its image.
    """
    height, width = images.shape[1:3]
    if crop >= min(height, width):
        raise ExperimentError(
            f"config.augment.crop must be below the size of the images, {height}x{width}, "
            f"got {crop}"
        )
    places = jax.random.randint(key, (len(images), 2), 0, 2 * crop + 1)
    padded = jnp.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)), mode=BORDERS[border])

    def cut(image: Array, place: Array) -> Array:
        return jax.lax.dynamic_slice(image, (place[0], place[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, places)


def create_augmentation(
    *, flip: bool, crop: int, border: Border
) -> Callable[[Array, Array], Array] | None:
    """Creates `(key, images [B, H, W, channels]) -> images`, or None without any variation.

    Each image has its own draw, whatever devices the batch lies on. The draws of one variation do
    not depend on whether the other is on.

    Args:
      flip: whether images are mirrored at random; not for digits, which mirroring changes.
      crop: pixels of padding on every side before a random crop; 0: no crop.
      border: content of that padding, `"zeros"` or `"edge"`.

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

    def augment(key: Array, images: Array) -> Array:
        flip_key, place_key = jax.random.split(key)
        if flip:
            images = mirror(flip_key, images)
        return random_crop(place_key, images, crop, border) if crop else images

    return augment
