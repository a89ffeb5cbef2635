"""Training batches: which images a step sees, and how they reach the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.cluster import distributed
from experiments.data import Images
from experiments.train.mesh import place

# Of an accelerator's memory, at most this part is for the data set.
_SHARE = 0.25


class Feed:
    """Calls give the batch of a step: images and labels.

    A data set that fits lies on every device, and a batch is gathered there: the host sends the
    order of an epoch once, and nothing at a step. A larger one is gathered by the host, by every
    process for its own devices only. Which images those are depends on the step alone.
    """

    def __init__(
        self, data: Images, batch_size: int, seeds: Sequence[int], sharding: NamedSharding
    ):
        """Puts the data on the devices if it fits.

        Args:
          data: the training images.
          batch_size: images of one step.
          seeds: of the order; batches of several have a leading axis, one entry per seed.
          sharding: of the batch.
        """
        self._data, self._batch_size, self._seeds = data, batch_size, tuple(seeds)
        self._sharding = sharding
        self._epoch, self._order = -1, None
        self._resident = None
        # Machines may have unequal memory, but all must run the same programs.
        if distributed.decided(_fits(data.images.nbytes, sharding.mesh.local_devices[0]), all):
            self._replicated = NamedSharding(sharding.mesh, PartitionSpec())
            self._resident = tuple(place(array, self._replicated) for array in data)

            def gather(images, labels, order, start):
                chosen = jax.lax.dynamic_slice_in_dim(order, start, batch_size, axis=-1)
                return images[chosen], labels[chosen]

            self._gather = jax.jit(gather, out_shardings=(sharding, sharding))

    def __call__(self, step: int) -> tuple[jax.Array, jax.Array]:
        """The batch of a step: `images` `[B, H, W, channels]` and `labels` `[B]`."""
        count = len(self._data)
        if self._resident is None:
            return self._from_host(
                self._of_seeds(lambda seed: batch_indices(seed, step, count, self._batch_size))
            )
        epoch, position = divmod(step, count // self._batch_size)
        if epoch != self._epoch:
            order = self._of_seeds(lambda seed: permutation(seed, epoch, count))
            self._epoch = epoch
            self._order = place(order.astype(np.int32), self._replicated)
        return self._gather(*self._resident, self._order, np.int32(position * self._batch_size))

    def _from_host(self, indices: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """The images at `indices`, read for the devices of this process."""

        # Images and labels of one part, and devices with the same part, are read once.
        @functools.cache
        def part(ranges: tuple[tuple[int, int, int], ...]) -> Images:
            return self._data.take(indices[tuple(slice(*range_) for range_ in ranges)])

        def of(field: int) -> jax.Array:
            array = self._data[field]
            shape = (*indices.shape, *array.shape[1:])

            def read(index: tuple[slice, ...]) -> np.ndarray:
                ranges = zip(index, indices.shape, strict=False)
                return part(tuple(cut.indices(size) for cut, size in ranges))[field]

            return jax.make_array_from_callback(shape, self._sharding, read)

        return of(0), of(1)

    def _of_seeds(self, indices: Callable[[int], np.ndarray]) -> np.ndarray:
        found = [indices(seed) for seed in self._seeds]
        return np.stack(found) if len(found) > 1 else found[0]


def batch_indices(seed: int, step: int, count: int, batch_size: int) -> np.ndarray:
    """Which of `count` examples a step trains on: int `[batch_size]`, a pure function.

    Every epoch is a new permutation; what does not fill its last batch is left out of that epoch.
    """
    epoch, position = divmod(step, count // batch_size)
    return permutation(seed, epoch, count)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch, int `[count]`."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def _fits(size: int, device: jax.Device) -> bool:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    # Where no limit is known, as on CPU, the host holds the data in any case.
    return limit is None or size <= _SHARE * limit
