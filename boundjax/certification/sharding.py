"""Batches divided over devices that do not communicate."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from boundjax.typing import Device, Jitted, PyTree

_AXIS = "examples"


def mesh_of(devices: Sequence[Device] | None, examples: int) -> Mesh | None:
    """A mesh of the devices that divide a batch, no more than it has examples; None for None.

    Raises:
      ValueError: for no devices, the same one twice, or one of another process.
    """
    if devices is None:
        return None
    devices = list(devices)
    if not devices:
        raise ValueError("devices must name at least one device, or be None, got none")
    if len(set(devices)) < len(devices):
        raise ValueError(f"devices must differ from each other, got {devices}")
    elsewhere = [device for device in devices if device.process_index != jax.process_index()]
    if elsewhere:
        raise ValueError(
            f"devices must be of this process, as jax.local_devices() are, got {elsewhere[0]} of "
            f"process {elsewhere[0].process_index}"
        )
    used = np.array(devices[:examples])
    return Mesh(used, (_AXIS,), axis_types=(AxisType.Auto,))


def count(mesh: Mesh | None) -> int:
    """Number of devices."""
    return 1 if mesh is None else mesh.size


def compiled(function: Callable[..., Array], mesh: Mesh | None, whole: int) -> Jitted:
    """Compiles a function of batches `[B, ...]`, whose first `whole` arguments have no batch axis.

    Each device runs the program on its own part of the batch. (Automatic partitioning would turn a
    loop over examples into one loop over all of them on every device.)
    """
    if mesh is None:
        return jax.jit(function)

    def divided(*arguments: Any) -> Array:
        batched = len(arguments) - whole
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(*(PartitionSpec(),) * whole, *(PartitionSpec(_AXIS),) * batched),
            out_specs=PartitionSpec(_AXIS),
            # The model's jaxpr was traced outside of this function, without the annotations of
            # which values vary between devices.
            check_vma=False,
        )(*arguments)

    return jax.jit(divided)


def whole(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Arrays copied to every device."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def parts(array: np.ndarray, mesh: Mesh | None) -> Array:
    """A batch `[B, ...]` divided into one equal part for each device."""
    if mesh is None:
        return jnp.asarray(array)
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(_AXIS)))
