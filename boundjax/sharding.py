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
from jax.typing import ArrayLike

from boundjax.typing import Device, Jitted, PyTree


def mesh_of(
    devices: Sequence[Device] | None, most: int | None = None, axis: str = "examples"
) -> Mesh | None:
    """A mesh of the devices that divide a batch, no more than `most`; None for None.

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
    return Mesh(np.array(devices[:most]), (axis,), axis_types=(AxisType.Auto,))


def count(mesh: Mesh | None) -> int:
    """Number of devices."""
    return 1 if mesh is None else mesh.size


def platforms(mesh: Mesh) -> set[str]:
    """Those of all devices."""
    return {device.platform for device in mesh.devices.flat}


def compiled(
    function: Callable[..., Any], mesh: Mesh | None, whole: int, like: int | None = None
) -> Jitted:
    """Compiles a function of batches `[B, ...]`, whose first `whole` arguments have no batch axis.

    Each device runs the program on its own part of the batch. (Automatic partitioning would turn a
    loop over examples into one loop over all of them on every device.)

    Args:
      function: takes pytrees. A number in a batch, such as the step count of an optimizer, is one
        for all examples.
      mesh: None for the default device.
      whole: the number of arguments without a batch axis.
      like: the index of an argument whose pytree the result has; by default every array of the
        result has a batch axis.
    """
    if mesh is None:
        return jax.jit(function)

    def divided(*arguments: Any) -> Any:
        rest = [jax.tree.map(lambda leaf: _spec(mesh, leaf), batch) for batch in arguments[whole:]]
        specs = (*(PartitionSpec(),) * whole, *rest)
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(*mesh.axis_names) if like is None else specs[like],
            # The model's jaxpr was traced outside of this function, without the annotations of
            # which values vary between devices.
            check_vma=False,
        )(*arguments)

    return jax.jit(divided)


def compiled_result(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Compiles a function of a divided batch that divides its result in the same way.

    It is for functions that treat examples one by one and cost little to trace.
    """
    if mesh is None:
        return jax.jit(function)
    jitted: list[Callable[..., Any]] = []

    def divided(*arguments: Any) -> Any:
        if not jitted:
            shapes = jax.eval_shape(function, *arguments)
            where = jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(mesh, leaf)), shapes)
            jitted.append(jax.jit(function, out_shardings=where))
        return jitted[0](*arguments)

    return divided


def _spec(mesh: Mesh, leaf: Any) -> PartitionSpec:
    """How a leaf of a batch is divided: along its first axis, if it has one."""
    return PartitionSpec(*mesh.axis_names) if leaf.ndim else PartitionSpec()


def whole(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Arrays copied to every device."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def parts(array: ArrayLike, mesh: Mesh | None) -> Array:
    """A batch `[B, ...]` divided into one equal part for each device."""
    if mesh is None:
        return jnp.asarray(array)
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*mesh.axis_names)))
