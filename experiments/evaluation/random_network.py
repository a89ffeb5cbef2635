"""A random network on all local devices: its predictions, gradients and attacks.

Loops over draws and steps are in Python: XLA's CPU backend runs convolutions several times slower
inside a loop. All draws follow from the keys that the functions are given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import boundjax as bj
from boundjax.attacks import Descent
from experiments.data import Images
from experiments.evaluation.attack_points import moved_inside

Kind = Literal["eot-fgsm", "eot-pgd"]


class Attack(NamedTuple):
    """An attack over the draws of a random network, `draws` of them per gradient.

    EOT-FGSM takes one step of length `eps`; EOT-PGD takes `steps` steps of `eps / 4` from the image
    and keeps the last iterate (Athalye et al. 2018; Lee et al. 2022).
    """

    kind: Kind
    draws: int
    eps: float
    steps: int = 1

    @property
    def name(self) -> str:
        """Names the attack in files: `eot-pgd-n20-eps0.3`; the steps are among the settings."""
        return f"{self.kind}-n{self.draws}-eps{self.eps:.6g}"

    def keys(self, key: jax.Array) -> list[jax.Array]:
        """The keys `[n]` of the draws of every step."""
        steps = list(jax.random.split(key, self.steps)) if self.steps else []
        return [jax.random.split(step, self.draws) for step in steps]


class RandomNetwork:
    """A random network on all local devices, which divide every batch.

    It compiles once for all draws, radii and attacks, which are arguments. All methods take at most
    `size` images.
    """

    def __init__(self, model: bj.PureModel, threat: bj.Threat, batch_size: int):
        """Places the variables on the devices; compiles nothing yet.

        Args:
          model: the network, `apply(variables, x, key)`.
          threat: norm and clip range of the attacks; each attack has a radius of its own.
          batch_size: images in one pass, padded to a multiple of the number of devices.
        """
        self._model, self._threat = model, threat
        devices = jax.local_devices()
        mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
        )
        self._sharded = NamedSharding(mesh, PartitionSpec("data"))
        self._variables = jax.device_put(model.variables, NamedSharding(mesh, PartitionSpec()))
        self.size = batch_size
        self._padded_size = -(-batch_size // len(devices)) * len(devices)

    def mean_softmax(self, images: np.ndarray, keys: Sequence[jax.Array] | jax.Array) -> np.ndarray:
        """The mean softmax `[B, C]` over the draws of `keys` (`boundjax.stochastic`)."""
        padded = np.resize(images, (self._padded_size, *images.shape[1:]))
        placed = jax.device_put(padded, self._sharded)
        mean = _mean([self._softmax(self._variables, placed, key) for key in keys])
        return np.asarray(mean)[: len(images)]

    def correct(self, data: Images, keys: Sequence[jax.Array] | jax.Array) -> np.ndarray:
        """Which images the mean softmax classifies correctly, `[B]`; a tie or NaN is a mistake."""
        probabilities = self.mean_softmax(data.images, keys)
        true = np.take_along_axis(probabilities, data.labels[:, None], axis=-1)
        is_label = np.arange(probabilities.shape[-1])[None] == data.labels[:, None]
        return np.all((true > probabilities) | is_label, axis=-1)

    def gradients(self, data: Images, keys: Sequence[jax.Array] | jax.Array) -> np.ndarray:
        """The gradients `[n, B, ...]` of each draw's cross-entropy with respect to the images."""
        images, labels = self._placed(data)
        each = [
            -np.asarray(self._gradient(images, labels, images, 0.0, key))[: len(data)]
            for key in keys
        ]
        return np.stack(each)

    def attacked(
        self, data: Images, eps: float, length: float, keys: Sequence[jax.Array]
    ) -> np.ndarray:
        """The points `[B, ...]` that EOT finds within `eps` by steps of `length`.

        Args:
          data: the images, where the attack starts.
          eps: the radius.
          length: of a step.
          keys: for each step, the keys `[n]` of its draws, over which its gradient is the mean.
        """
        images, labels = self._placed(data)
        iterate = images
        for step in keys:
            gradients = [self._gradient(images, labels, iterate, eps, draw) for draw in step]
            iterate = self._move(images, labels, iterate, eps, length, _mean(gradients))
        points = np.asarray(iterate)[: len(data)]
        points = np.where(np.isnan(points), data.images, points)
        return moved_inside(points, data.images, self._threat.within(eps))

    def _placed(self, data: Images) -> tuple[jax.Array, jax.Array]:
        padded = data.take(np.resize(np.arange(len(data)), self._padded_size))
        return jax.device_put(tuple(padded), self._sharded)

    @functools.cached_property
    def _softmax(self) -> Callable[..., jax.Array]:
        @jax.jit
        @jax.default_matmul_precision("highest")
        def softmax(variables: Any, images: jax.Array, key: jax.Array) -> jax.Array:
            return jax.nn.softmax(self._model.apply(variables, images, key))

        return softmax

    def _gradient(self, images: jax.Array, labels: jax.Array, *arguments: Any) -> jax.Array:
        """The gradient of what attacks descend: arguments are iterate, radius and draw."""
        return self._part("gradient", self._variables, images, labels, 0.0, *arguments)

    def _move(self, images: jax.Array, labels: jax.Array, *arguments: Any) -> jax.Array:
        iterate, eps, length, direction = arguments
        return self._part("move", self._variables, images, labels, length, iterate, eps, direction)

    @functools.cached_property
    def _part(self) -> Callable[..., jax.Array]:
        @functools.partial(jax.jit, static_argnums=0)
        @jax.default_matmul_precision("high")
        def part(name, variables, images, labels, length, iterate, eps, argument):
            descent = Descent(
                lambda x, key: self._model.apply(variables, x, key),
                images,
                labels,
                self._threat.within(eps),
                length,
                "cross_entropy",
                draws=1,
            )
            return getattr(descent, name)(iterate, argument)

        return part


def _mean(arrays: Sequence[jax.Array]) -> jax.Array:
    # A sum on the devices, one after the other, which has the memory of one.
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total / float(len(arrays))
