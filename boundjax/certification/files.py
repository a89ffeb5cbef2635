"""Certificates as files that a program without JAX can check: `boundjax/check.py`.

A file holds what was claimed and how it can be derived again; the network stays outside, and a hash
says which one it is. `docs/certificates.md` describes the format.
"""

# JAX leaves some of its types unknown, and so does what comes from files.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from boundjax import check, check_attack
from boundjax.certification import export
from boundjax.sets import rounding
from boundjax.sets.threat import Threat

_PACKAGES = ("boundjax", "jax", "jaxlib", "numpy")


def inputs_of(x: ArrayLike, count: int) -> np.ndarray:
    """The inputs `[B, ...]` of a certificate, in the dtype that was certified.

    Raises:
      ValueError: for another number of inputs, or values that are not finite floating-point
        numbers.
    """
    values = np.asarray(x)
    if values.dtype not in (np.dtype(np.float32), np.dtype(np.float64)) or values.ndim < 1:
        raise ValueError(f"x must be a float32 batch, got {values.dtype} of shape {values.shape}")
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(
            f"x must be the {count} finite inputs that were certified, got shape {values.shape}"
        )
    return np.ascontiguousarray(values, jax.dtypes.canonicalize_dtype(values.dtype))


def threat_entries(threat: Threat, x: np.ndarray) -> dict[str, np.ndarray]:
    """Radius and clip range in the dtype of the inputs, rounded outwards as `certify` does."""
    eps = rounding.up(threat.eps, x.dtype)
    per_example = eps.shape == x.shape[:1]
    try:
        fits = per_example or np.broadcast_shapes(eps.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits or (eps.ndim not in (0, x.ndim) and not per_example):
        raise ValueError(f"eps of shape {eps.shape} does not fit x of shape {x.shape}")
    if threat.clip is None:
        return {"eps": eps}
    low, high = (np.asarray(end) for end in threat.clip)
    low, high = -rounding.up(-low, x.dtype), rounding.up(high, x.dtype)
    return {"eps": eps, "clip_low": low, "clip_high": high}


def network_of(model: Any, x: np.ndarray) -> tuple[list[str], int | None]:
    """Which network it is, as a certificate says it, and its number of logits if that is known.

    Args:
      model: what `certify` accepts, or the path of a file: what `export_weights` wrote (npz), or an
        ONNX file.
      x: the inputs `[B, ...]`.
    """
    if not isinstance(model, str | os.PathLike):
        weights = export.weights_of(model, x)
        return ["weights", check.digest(weights.arrays)], weights.logits
    path = Path(model)
    if path.suffix != ".npz":
        return ["onnx", hashlib.sha256(path.read_bytes()).hexdigest()], None
    nodes, network = reading(check.read_weights, path)
    return network, nodes[-1].size


def witnesses_of(method: str, witness: Sequence[str] | None) -> list[str]:
    """The rules by which the checker derives the bounds of a method again.

    Raises:
      ValueError: for a method without such a rule, or an unknown witness.
    """
    names = ", ".join(check.WITNESSES)
    if witness is None:
        if method not in check.WITNESSES:
            raise ValueError(
                f"the checker cannot derive the bounds of method {method!r} again; give witness=, "
                f"some of {names}, that prove as much, and margins=False"
            )
        return [method]
    if isinstance(witness, str) or not witness or not set(witness) <= set(check.WITNESSES):
        raise ValueError(f"witness must be a list of some of {names}, got {witness!r}")
    return list(witness)


def write(
    path: str | os.PathLike[str],
    arrays: dict[str, np.ndarray],
    *,
    method: str,
    arithmetic: str,
    norm: float,
    witness: Sequence[str],
    network: list[str],
    x: np.ndarray,
    with_inputs: bool,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Writes a certificate.

    Args:
      path: of the file.
      arrays: labels, verified, margins, and what `threat_entries` gives.
      method, arithmetic, norm: as of a `Certificate`.
      witness: what `witnesses_of` gives.
      network: what `network_of` gives.
      x: the inputs `[B, ...]`.
      with_inputs: whether the file holds the inputs, or their hash alone.
      versions: those of the packages that computed the claims; by default those of this process.

    Raises:
      ValueError: for a norm that the checker does not know.
      OSError: if the file cannot be written.
    """
    claims = {
        "format": "boundjax-certificate",
        "version": 1,
        "method": method,
        "arithmetic": arithmetic,
        "norm": _norm(norm),
        "witness": list(witness),
        "network": network,
        "inputs": check.digest({"x": x}),
        "versions": versions_of(versions),
    }
    inputs = {"x": x} if with_inputs else {}
    export.write(path, {**arrays, **inputs, "json": export.encoded(claims)})


def write_attack(
    path: str | os.PathLike[str],
    model: Any,
    x: ArrayLike,
    labels: ArrayLike,
    threat: Threat,
    *,
    method: str,
    misclassified: np.ndarray,
    points: Mapping[int, np.ndarray],
    versions: Mapping[str, str] | None = None,
) -> None:
    """Writes the points of an attack as a file that `python -m boundjax.check_attack` reads.

    It holds the points and a hash of the inputs, not the inputs.

    Args:
      path: of the file.
      model: as of `network_of`.
      x: the inputs `[B, ...]`.
      labels: int `[B]`.
      threat: the set of each example, in which its point lies.
      method: the name of the attack, for the reader.
      misclassified: bool `[B]`, where the input itself is misclassified.
      points: the index of another example -> a misclassified point of its set, of the shape and
        dtype of the input.
      versions: as of `write`.

    Raises:
      ValueError: for inputs, labels or points of other shapes; a norm that the checker does not
        know.
      UnsupportedOpError: at an op of the model that the checker does not know.
      OSError: if the file cannot be written.
    """
    classes = np.asarray(labels)
    inputs = inputs_of(x, len(classes))
    attack = np.where(misclassified, check_attack.ITSELF, check_attack.NOTHING).astype(np.int8)
    order = sorted(points)
    shape = inputs.shape[1:]
    if attack[order].any() or any(points[example].shape != shape for example in order):
        raise ValueError(
            f"points must have the shape {shape} and belong to examples that are not misclassified "
            "themselves"
        )
    attack[order] = check_attack.MOVED
    shown = np.zeros((len(order), *shape), inputs.dtype)
    for place, example in enumerate(order):
        shown[place] = points[example]
    claims = {
        "format": check_attack.FORM,
        "version": 1,
        "method": method,
        "norm": _norm(float(threat.norm)),
        "network": network_of(model, inputs)[0],
        "inputs": check.digest({"x": inputs}),
        "versions": versions_of(versions),
    }
    arrays = {
        "labels": np.ascontiguousarray(classes, np.int32),
        "attack": attack,
        "points": shown,
        **threat_entries(threat, inputs),
    }
    export.write(path, {**arrays, "json": export.encoded(claims)})


def read_points(path: str | os.PathLike[str]) -> dict[int, np.ndarray]:
    """The `points` of a file that `write_attack` wrote, as they were given to it.

    Raises:
      ValueError, OSError: as `read`.
    """
    _, arrays = reading(check_attack.read_attack, Path(path))
    examples = np.flatnonzero(arrays["attack"] == check_attack.MOVED)
    return dict(zip(examples.tolist(), arrays["points"], strict=True))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The claims and the arrays of a certificate.

    Raises:
      ValueError: one line for whatever is wrong with the content.
      OSError: if the file cannot be opened.
    """
    return reading(check.read_certificate, Path(path))


def reading(read: Any, path: Path) -> Any:
    """What a function of the checker reads; its errors about the content become ValueError."""
    try:
        return read(path)
    except OSError:
        raise
    except Exception as error:  # whatever an untrusted file may provoke
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(f"{path.name}: {reason}") from None


def _norm(norm: float) -> str | int:
    if norm not in (1, 2, math.inf):
        raise ValueError(f"the checker knows the norms 1, 2 and inf, got {norm}")
    return "inf" if norm == math.inf else int(norm)


def versions_of(versions: Mapping[str, str] | None = None) -> dict[str, str]:
    """The versions of the packages, by default those of this process."""
    return dict(versions or {name: _version(name) for name in _PACKAGES})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
