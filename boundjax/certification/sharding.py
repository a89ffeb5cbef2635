"""A batch divided over devices, each of which computes its part without hearing of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

_AXIS = "examples"


def mesh_of(devices: Sequence[jax.Device] | None, examples: int) -> Mesh | None:
    """The devices that share so many examples, none of which has nothing to do; None for None.

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
    """How many devices there are."""
    return 1 if mesh is None else mesh.size


def compiled(function: Callable[..., Array], mesh: Mesh | None, whole: int) -> Callable[..., Array]:
    """Compiles a function of batches ``[B, ...]`` to one, after ``whole`` arguments that have none.

    Every device runs the program of its own part: what maps over examples one by one does not turn
    into a walk through all of them, and nothing is sent.
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
            # A model is traced before it is known to run here: its values do not say that they
            # differ between devices.
            check_vma=False,
        )(*arguments)

    return jax.jit(divided)


def whole(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Arrays that every device has."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def parts(array: np.ndarray, mesh: Mesh | None) -> Array:
    """A batch ``[B, ...]``, an equal part of which every device has."""
    if mesh is None:
        return jnp.asarray(array)
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(_AXIS)))
