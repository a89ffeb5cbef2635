"""How much memory a search takes by default, and the check of other limits."""

from __future__ import annotations

MAX_BYTES = 2**30  # of one call, on each device
MAX_QUEUE_BYTES = 2**30  # of the parts of a box that are still open, on the host


def checked_bytes(value: int, name: str) -> int:
    """A limit.

    Raises:
      ValueError: if it is less than 1.
    """
    if not value >= 1:
        raise ValueError(f"{name} must be >= 1, in bytes, got {value}")
    return value


def full(count: int, what: str, taken: int, most: int) -> str:
    """Why a search ends: `count` parts of a box take more than the host may keep."""
    return (
        f"the {count} open {what} take {taken} bytes of the host's memory, and "
        f"max_queue_bytes={most}: allow more (--max-queue-bytes of the command)"
    )
