"""Memory: what a compiled call needs, and what the machine has free."""

# JAX and Flax leave some of their types unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from boundjax.typing import Device, PyTree


class MemoryEstimate(NamedTuple):
    """Peak memory for bounding one batch, before anything is computed.

    Attributes:
      peak: bytes of the inputs, weights, results and temporaries of one compiled call on one
        device, according to the compiler.
      batch_size: number of examples of the call, on all devices together.
      available: free bytes on a device, None if the system does not say.
    """

    peak: int
    batch_size: int
    available: int | None


def peak_of(compiled: Any, weights: PyTree = ()) -> int:
    """Bytes that an executable (`jax.jit(f).lower(...).compile()`) takes while it runs.

    Args:
      compiled: the executable.
      weights: weights that rows are multiplied with. On CPU the largest of them is copied into the
        layout of matrix products, which the compiler does not count.

    Returns:
      The bytes, or 0 on a backend that does not report them.
    """
    usage = compiled.memory_analysis()
    if usage is None:
        return 0
    parts = usage.temp_size_in_bytes, usage.argument_size_in_bytes, usage.output_size_in_bytes
    peak: int = sum(parts) - usage.alias_size_in_bytes
    if jax.default_backend() == "cpu":
        leaves: list[Any] = jax.tree.leaves(weights)
        sizes: list[int] = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
        peak += max(sizes, default=0)
    return peak


def available_bytes(devices: Sequence[Device] | None = None) -> int | None:
    """Free bytes on each of the devices (by default the first); None if the system does not say.

    CPU devices share one memory, which is divided between them.
    """
    used: Sequence[Device] = jax.local_devices()[:1] if devices is None else devices
    if used[0].platform == "cpu":
        free = _within_container(_free_memory())
        return None if free is None else free // len(used)
    stats: list[dict[str, int]] = [device.memory_stats() or {} for device in used]
    if not all("bytes_limit" in usage for usage in stats):
        return None
    return min(usage["bytes_limit"] - usage.get("bytes_in_use", 0) for usage in stats)


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(fields["MemAvailable"].split()[0]) if "MemAvailable" in fields else None


def _within_container(free: int | None) -> int | None:
    """`free`, or less if the container's limit (cgroup version 2) leaves less."""
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
    """A number of bytes for people: `1.5 GiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
