"""The one mesh of a run: which devices share what.

Axis `data` divides the batch. Axis `fsdp` divides the batch too, and with it the parameters and the
state of the optimizer (fully sharded data parallelism). Axis `spec` divides the rows of the
specification, the classes, of linear bounds.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.cluster import distributed
from experiments.settings.config import MeshConfig
from experiments.settings.errors import ExperimentError

AXES = ("data", "fsdp", "spec")
# The axes that a batch is divided over.
BATCH = ("data", "fsdp")
# Leaves with fewer entries stay whole on every device: sending them is slower than keeping them.
_SMALL = 1024


def create_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes.

    One process may leave devices over; with several, a process without a device could do nothing.

    Args:
      config: the size of every axis, one of them perhaps -1: what the others leave.
      devices: instead of all devices.

    Raises:
      ExperimentError: if the devices cannot be laid out so.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    wanted = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if fixed > count or count % fixed:
        raise ExperimentError(
            f"config.mesh {wanted} needs {'a multiple of ' if -1 in sizes else ''}{fixed} devices, "
            f"which must divide the {count} that there are"
        )
    sizes = [count // fixed if size == -1 else size for size in sizes]
    used = math.prod(sizes)
    if used < count and len({device.process_index for device in devices}) > 1:
        raise ExperimentError(
            f"config.mesh {wanted} has {used} devices, but the processes have {count}: set one "
            "axis to -1"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:used])


def device_name(devices: Sequence[Any]) -> str:
    """Number and kind of `devices`, and of the processes if there are several."""
    name = f"{len(devices)} x {devices[0].device_kind}"
    if name.endswith("cpu"):
        name += f" ({platform.machine()}, {os.cpu_count()} cores)"
    count = distributed.processes()
    return name if count == 1 else f"{name} in {count} processes"


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, together: bool = False) -> NamedSharding:
    """Of the images of a batch, whose first axis is that of the seeds if there are several."""
    return NamedSharding(mesh, PartitionSpec(*((None,) if together else ()), BATCH))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises an ExperimentError if the devices cannot have equal parts of a batch."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    if batch_size % parts:
        raise ExperimentError(
            f"config.train.batch_size must be a multiple of the {parts} devices, got {batch_size} "
            f"(config.mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} divides a batch)"
        )


def state_shardings(state: Any, mesh: Mesh, together: bool = False) -> Any:
    """How a train state lies: parameters and optimizer state over `fsdp`, all else whole.

    The largest axis that `fsdp` divides is divided. A leaf of the optimizer has the shape of its
    parameter, and lies like it.

    Args:
      state: collections by name, of arrays or their shapes.
      mesh: of `create_mesh`.
      together: every leaf has a leading axis, one entry per seed.
    """
    size = mesh.shape["fsdp"]

    def divided(leaf: Any) -> NamedSharding:
        shape = leaf.shape[1:] if together else leaf.shape
        fitting = [axis for axis, length in enumerate(shape) if length % size == 0]
        if size == 1 or math.prod(shape) < _SMALL or not fitting:
            return replicated(mesh)
        largest = max(fitting, key=lambda axis: shape[axis]) + together
        return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "fsdp"))

    return {
        name: jax.tree.map(
            divided if name in ("params", "opt_state") else lambda leaf: replicated(mesh), value
        )
        for name, value in state.items()
    }


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, as a global one: nothing is sent between processes."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def on_host(tree: Any) -> Any:
    """The whole arrays as NumPy's, on every process; all processes must call this."""

    def fetch(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(fetch, tree))
