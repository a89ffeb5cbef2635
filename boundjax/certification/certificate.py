"""What `certify` answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from boundjax.sets.rounding import Rounding
from boundjax.sets.threat import Threat


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """Guaranteed answers for a batch.

    Attributes:
      verified: bool `[B]`; True where every margin to another class is positive on the whole input
        set. An example whose label is not the model's prediction is never verified.
      margins: float `[B, C]`; lower bounds on `z_y - z_m` over the input set; 0 at `m = y`.
      labels: int `[B]`; the classes `y` the certificate is about.
      threat: radius, norm and clip range that it holds for.
      method: which bounds were used.
      arithmetic: which arithmetic it holds for. `"nearest"`: the network with these weights in real
        arithmetic, up to the rounding of the bound computation itself. `"real"`: that network,
        without reservation. `"float32"`: also every execution of it in floating-point arithmetic.
    """

    verified: np.ndarray
    margins: np.ndarray
    labels: np.ndarray
    threat: Threat
    method: str
    arithmetic: Rounding = "nearest"

    def __str__(self) -> str:
        """One line that says what is certified."""
        threat = self.threat
        order = "inf" if threat.norm == np.inf else f"{threat.norm:g}"
        clip = "not clipped" if threat.clip is None else f"clipped to {_range(threat.clip)}"
        return (
            f"{int(np.sum(self.verified))} of {len(self.verified)} examples verified within eps "
            f"{_values(threat.eps)} (l{order}, {clip}) by {self.method}, {self.arithmetic}"
        )

    def __repr__(self) -> str:
        """As `str`, in brackets."""
        return f"<Certificate: {self}>"


def _values(value: Any) -> str:
    """A number, or the range of an array's numbers."""
    low, high = float(np.min(value)), float(np.max(value))
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def _range(clip: tuple[Any, Any]) -> str:
    return f"[{_values(clip[0])}, {_values(clip[1])}]"
