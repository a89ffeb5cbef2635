import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.settings.errors import ExperimentError
from experiments.train.augment import create_augmentation, random_crop

pytestmark = pytest.mark.quick

COUNT = 1800


def _windows(image, crop, border):
    """All that can become of an image: `[mirrored, row, column]` of arrays of its shape."""
    height, width = image.shape[:2]
    mode = {"zeros": "constant", "edge": "edge"}[border]
    places = range(2 * crop + 1)
    return np.stack(
        [
            [
                [padded[row : row + height, column : column + width] for column in places]
                for row in places
            ]
            for view in (image, image[:, ::-1])
            for padded in (np.pad(view, ((crop, crop), (crop, crop), (0, 0)), mode=mode),)
        ]
    )


@pytest.mark.parametrize(
    ("flip", "crop", "border"),
    [(True, 1, "zeros"), (True, 1, "edge"), (False, 2, "zeros"), (True, 0, "zeros")],
)
def test_every_window_is_equally_likely(flip, crop, border):
    image = np.arange(1, 25, dtype=np.float32).reshape(3, 4, 2)  # a window tells where it is from
    augment = create_augmentation(flip=flip, crop=crop, border=border)
    augmented = np.asarray(
        augment(jax.random.key(3), jnp.broadcast_to(image, (COUNT, *image.shape)))
    )
    windows = _windows(image, crop, border)[: 1 + flip].reshape(-1, *image.shape)
    result = np.all(augmented[:, None] == windows[None], axis=(2, 3, 4))
    np.testing.assert_array_equal(result.sum(axis=1), 1)
    expected = COUNT / len(windows)
    assert np.all(np.abs(result.sum(axis=0) - expected) < 4 * np.sqrt(expected))


def test_draws_stay_what_they_were():
    # Runs are repeated by seed: a change of the draws is a change of every published number.
    images = jax.random.uniform(jax.random.key(1), (12, 8, 8, 2), minval=0.1)
    augment = create_augmentation(flip=True, crop=4, border="zeros")
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 2), 5)
    flip_key, place_key = jax.random.split(key)
    mirrored = jax.random.bernoulli(flip_key, shape=(12, 1, 1, 1))
    places = jax.random.randint(place_key, (12, 2), 0, 9)
    expected = np.stack(
        [
            _windows(np.asarray(image), 4, "zeros")[int(flip[0, 0, 0]), place[0], place[1]]
            for image, flip, place in zip(images, mirrored, np.asarray(places), strict=True)
        ]
    )
    np.testing.assert_array_equal(augment(key, images), expected)


def test_augmentation_depends_on_the_key_alone():
    images = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1))
    settings = {"flip": True, "crop": 4, "border": "edge"}
    augment = jax.jit(create_augmentation(**settings))
    key = jax.random.key(5)
    first = np.asarray(augment(key, images))
    np.testing.assert_array_equal(create_augmentation(**settings)(key, images), first)
    assert np.any(first != augment(jax.random.key(6), images))
    # On several devices as on one.
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    np.testing.assert_array_equal(augment(key, jax.device_put(images, sharding)), first)


def test_images_of_one_batch_vary_apart():
    images = jnp.broadcast_to(jnp.arange(64.0).reshape(8, 8, 1), (16, 8, 8, 1))
    augmented = create_augmentation(flip=False, crop=3, border="edge")(jax.random.key(0), images)
    assert len(np.unique(augmented, axis=0)) > 8


@pytest.mark.parametrize("border", ["zeros", "edge"])
def test_nothing_asked_for_is_no_function(border):
    assert create_augmentation(flip=False, crop=0, border=border) is None


def test_bad_settings_are_one_line_errors():
    with pytest.raises(ExperimentError, match=r"augment\.crop must be >= 0 pixels, got -1$"):
        create_augmentation(flip=True, crop=-1, border="zeros")
    with pytest.raises(ExperimentError, match=r"must be one of zeros, edge, got 'reflect'$"):
        create_augmentation(flip=True, crop=1, border="reflect")
    with pytest.raises(ExperimentError, match=r"below the size of the images, 8x4, got 4$"):
        random_crop(jax.random.key(0), jnp.zeros((2, 8, 4, 1)), 4, "edge")
