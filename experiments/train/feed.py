"""Training batches: which images a step uses, and how they reach the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from boundjax.typing import Device
from experiments.cluster import distributed
from experiments.data import Images
from experiments.train.mesh import place

# Fraction of an accelerator's memory that the data set may use.
_SHARE = 0.25


class Feed:
    """Gives the batch of a step when called.

    A data set that fits lies on every device, and each device gathers its batches: the host sends
    the order of the images once per epoch, and nothing per step. The host gathers from a larger
    data set, in every process only for the devices of that process. The images of a batch depend on
    the step alone.
    """

    def __init__(
        self, data: Images, batch_size: int, seeds: Sequence[int], sharding: NamedSharding
    ):
        """Puts the data on the devices if it fits.

        Args:
          data: the training images.
          batch_size: number of images in a step.
          seeds: seeds of the order; with several, batches have a leading axis, one entry per seed.
          sharding: sharding of a batch.
        """
        mesh = sharding.mesh
        assert isinstance(mesh, Mesh)  # it has devices, unlike an abstract mesh
        self._data, self._batch_size, self._seeds = data, batch_size, tuple(seeds)
        self._sharding = sharding
        self._epoch, self._order = -1, None
        self._resident: tuple[jax.Array, jax.Array] | None = None
        # Machines may have unequal memory, but all must run the same programs.
        if distributed.decided(_fits(data.images.nbytes, mesh.local_devices[0]), all):
            self._replicated = NamedSharding(mesh, PartitionSpec())
            self._resident = (
                place(data.images, self._replicated),
                place(data.labels, self._replicated),
            )

            def gather(images, labels, order, start):
                indices = jax.lax.dynamic_slice_in_dim(order, start, batch_size, axis=-1)
                return images[indices], labels[indices]

            self._gather = jax.jit(gather, out_shardings=(sharding, sharding))

    def __call__(self, step: int) -> tuple[jax.Array, jax.Array]:
        """Returns the batch of a step: images `[B, H, W, channels]` and labels `[B]`."""
        count = len(self._data)
        if self._resident is None:
            return self._from_host(
                self._stack_seeds(lambda seed: batch_indices(seed, step, count, self._batch_size))
            )
        epoch, position = divmod(step, count // self._batch_size)
        if epoch != self._epoch:
            order = self._stack_seeds(lambda seed: permutation(seed, epoch, count))
            self._epoch = epoch
            self._order = place(order.astype(np.int32), self._replicated)
        return self._gather(*self._resident, self._order, np.int32(position * self._batch_size))

    def _from_host(self, indices: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Reads the images at `indices` for the devices of this process."""

        # Images and labels, and devices with the same part, share one read.
        @functools.cache
        def part(ranges: tuple[tuple[int, int, int], ...]) -> Images:
            return self._data.take(indices[tuple(slice(*range_) for range_ in ranges)])

        def gather(field: int) -> jax.Array:
            array = self._data[field]
            shape = (*indices.shape, *array.shape[1:])

            def read(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # JAX allows it in the type but never passes it
                ranges = zip(index, indices.shape, strict=False)
                return part(tuple(cut.indices(size) for cut, size in ranges))[field]

            return jax.make_array_from_callback(shape, self._sharding, read)

        return gather(0), gather(1)

    def _stack_seeds(self, indices: Callable[[int], np.ndarray]) -> np.ndarray:
        by_seed = [indices(seed) for seed in self._seeds]
        return np.stack(by_seed) if len(by_seed) > 1 else by_seed[0]


def batch_indices(seed: int, step: int, count: int, batch_size: int) -> np.ndarray:
    """Returns which of `count` examples a step trains on, int `[batch_size]`; a pure function.

    Every epoch is a new permutation; the images that do not fill its last batch are left out.
    """
    epoch, position = divmod(step, count // batch_size)
    return permutation(seed, epoch, count)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns the order of an epoch, int `[count]`."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def _fits(size: int, device: Device) -> bool:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    # A device without a limit, such as a CPU, uses the host's memory, which holds the data anyway.
    return limit is None or size <= _SHARE * limit
