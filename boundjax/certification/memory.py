"""What a compiled call will need, and what the machine has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree


class MemoryEstimate(NamedTuple):
    """What bounding one batch takes at its peak, known before anything is computed.

    Attributes:
      peak: bytes of the inputs, weights, results and temporaries of one compiled call on one
        device, as the compiler has laid them out.
      batch_size: for how many examples, on all devices together.
      available: bytes that are free on a device, None where the system does not tell.
    """

    peak: int
    batch_size: int
    available: int | None


def peak_of(compiled: Any, weights: PyTree = ()) -> int:
    """Bytes that an executable (``jax.jit(f).lower(...).compile()``) takes while it runs.

    Args:
      compiled: the executable.
      weights: those that rows are multiplied with; on CPU the largest of them is copied into the
        order that matrix products read, which the compiler does not count.

    Returns:
      0 on a backend that does not tell.
    """
    found = compiled.memory_analysis()
    if found is None:
        return 0
    parts = found.temp_size_in_bytes, found.argument_size_in_bytes, found.output_size_in_bytes
    peak = sum(parts) - found.alias_size_in_bytes
    if jax.default_backend() == "cpu":
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights)]
        peak += max(sizes, default=0)
    return peak


def available_bytes(devices: Sequence[jax.Device] | None = None) -> int | None:
    """Bytes that are free on each of some devices, or the first; None where nobody tells.

    Those of a CPU have one memory, which is divided between them.
    """
    devices = jax.local_devices()[:1] if devices is None else devices
    if devices[0].platform == "cpu":
        free = _limited(_free_memory())
        return None if free is None else free // len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in found for found in stats):
        return None
    return min(found["bytes_limit"] - found.get("bytes_in_use", 0) for found in stats)


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(fields["MemAvailable"].split()[0]) if "MemAvailable" in fields else None


def _limited(free: int | None) -> int | None:
    """No more than the container's limit (cgroup version 2) leaves."""
    try:
        limit, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii").strip()
            for name in ("max", "current")
        )
    except OSError:
        return free
    if limit == "max":
        return free
    left = max(0, int(limit) - int(used))
    return left if free is None else min(free, left)


def readable(count: int) -> str:
    """``1.5 GiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
