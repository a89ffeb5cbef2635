"""What `certify` answers."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from boundjax.certification import files
from boundjax.sets.rounding import Rounding
from boundjax.sets.threat import Threat


def _no_points() -> dict[int, np.ndarray]:
    return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """Guaranteed answers for a batch.

    Attributes:
      verified: bool `[B]`; True where every margin to another class is positive on the whole input
        set. An example whose label is not the model's prediction is never verified. `[B, ...]` for
        a model that classifies several positions of an example.
      margins: float `[B, C]`, or `[B, ..., C]`; lower bounds on `z_y - z_m` over the input set; 0
        at `m = y`. `[B, 0]` if no margins are claimed.
      labels: int `[B]`, or `[B, ...]`; the classes `y` the certificate is about.
      threat: radius, norm and clip range that it holds for.
      method: which bounds were used.
      arithmetic: which arithmetic it holds for. `"nearest"`: the network with these weights in real
        arithmetic, up to the rounding of the bound computation itself. `"real"`: that network,
        without reservation. `"float32"`: also every execution of it in floating-point arithmetic.
      counterexamples: by the index of an example, an input of its set at which another logit, as
        the model computes it in float32, is no smaller than the label's; the example itself if it
        is misclassified. Only `"complete"` looks for them.
      has_constants: whether the model took per-example constants, for which it holds.
    """

    verified: Bool[np.ndarray, "B ..."]
    margins: Float[np.ndarray, "B ... C"]
    labels: Int[np.ndarray, "B ..."]
    threat: Threat
    method: str
    arithmetic: Rounding = "nearest"
    counterexamples: Mapping[int, np.ndarray] = dataclasses.field(default_factory=_no_points)
    has_constants: bool = False

    @property
    def falsified(self) -> Bool[np.ndarray, "B ..."]:
        """The examples with a counterexample."""
        flags = np.zeros(np.shape(self.verified), bool)
        flags[list(self.counterexamples)] = True
        return flags

    @property
    def undecided(self) -> Bool[np.ndarray, "B ..."]:
        """The examples that are neither verified nor known to have a counterexample."""
        return ~self.verified & ~self.falsified

    def __str__(self) -> str:
        """One line that says what is certified."""
        threat = self.threat
        order = "inf" if threat.norm == np.inf else f"{threat.norm:g}"
        clip = "not clipped" if threat.clip is None else f"clipped to {_range(threat.clip)}"
        what = "examples" if np.ndim(self.verified) == 1 else "positions"
        falsified = f", {len(self.counterexamples)} falsified" if self.counterexamples else ""
        return (
            f"{int(np.sum(self.verified))} of {np.size(self.verified)} {what} verified{falsified} "
            f"within eps {_values(threat.eps)} (l{order}, {clip}) by {self.method}, "
            f"{self.arithmetic}"
        )

    def __repr__(self) -> str:
        """As `str`, in brackets."""
        return f"<Certificate: {self}>"

    @classmethod
    def of_radii(
        cls,
        radii: Float[ArrayLike, " B"],
        labels: Int[ArrayLike, " B"],
        *,
        method: str,
        norm: float = math.inf,
        clip: tuple[ArrayLike, ArrayLike] | None = None,
        arithmetic: Rounding = "nearest",
    ) -> Certificate:
        """The answers of `certified_radius` as a certificate, so that they can be saved.

        Args:
          radii: `[B]`; examples with radius 0 are not verified.
          labels: int `[B]`; the classes that `certified_radius` was asked about, by default the
            model's own predictions.
          method, norm, clip, arithmetic: those of `certified_radius`.

        Raises:
          ValueError: for other shapes, or labels that are not integers.
        """
        eps, classes = np.asarray(radii), np.asarray(labels)
        if eps.ndim != 1 or eps.shape != classes.shape or classes.dtype.kind not in "iu":
            raise ValueError(
                f"radii and labels must be [B], labels integers; got radii {eps.shape} and labels "
                f"{classes.dtype} {classes.shape}"
            )
        threat = Threat(eps, norm, clip)
        margins = np.zeros((len(eps), 0), np.float32)
        return cls(eps > 0, margins, classes.astype(np.int32), threat, method, arithmetic)

    def save(
        self,
        path: str | os.PathLike[str],
        model: Any,
        x: Float[ArrayLike, "B ..."],
        *,
        witness: Sequence[str] | None = None,
        margins: bool = True,
        with_inputs: bool = True,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Writes the certificate as a file that `python -m boundjax.check` proves again.

        Args:
          path: of the file, an npz without pickles; see `docs/certificates.md`.
          model: the model that was certified, or the path of its file: an ONNX file, or what
            `export_weights` wrote (npz). The certificate holds a hash of it.
          x: the inputs `[B, ...]` that were certified.
          witness: the rules by which the checker derives the bounds again, some of `"interval"`,
            `"crown-ibp"`, `"crown"`, `"fast-lin"`; by default the method.
          margins: whether the margins are claimed, or only which examples are verified.
          with_inputs: whether the file holds `x`; otherwise it holds a hash, and the checker needs
            `--data`.
          versions: those of the packages that certified, for the reader; by default those of this
            process.

        Raises:
          ValueError: for a certificate with per-example constants or several positions; inputs or
            a model that do not belong to the certificate as far as shapes
            tell, a norm other than 1, 2 and inf, or a method without a witness.
          UnsupportedOpError: at an op of the model that the checker does not know.
          OSError: if the file cannot be written.
        """
        if self.has_constants or np.ndim(self.labels) != 1:
            raise ValueError(
                "a file holds one network with one decision per example, not per-example constants "
                "or several positions; certify each with a function that has them fixed, and save "
                "that"
            )
        words = files.witnesses_of(self.method, witness)
        inputs = files.inputs_of(x, len(self.labels))
        threat = files.threat_entries(self.threat, inputs)
        network, logits = files.network_of(model, inputs)
        classes = self.margins.shape[1]
        if logits is not None and (
            classes not in (0, logits) or (self.labels < 0).any() or (self.labels >= logits).any()
        ):
            raise ValueError(
                f"the model has {logits} logits, but the certificate has {classes} margins per "
                f"example and labels from {self.labels.min()} to {self.labels.max()}"
            )
        # Nothing is claimed where a bound is infinite or NaN.
        claimed = np.where(np.isfinite(self.margins), self.margins, -np.inf)
        arrays = {
            "labels": np.ascontiguousarray(self.labels, np.int32),
            "verified": np.ascontiguousarray(self.verified, np.bool_),
            "margins": claimed if margins else claimed[:, :0],
            **threat,
        }
        files.write(
            path,
            arrays,
            method=self.method,
            arithmetic=self.arithmetic,
            norm=float(self.threat.norm),
            witness=words,
            network=network,
            x=inputs,
            with_inputs=with_inputs,
            versions=versions,
        )


def load_certificate(path: str | os.PathLike[str]) -> Certificate:
    """Reads what `Certificate.save` wrote. It proves nothing: `python -m boundjax.check` does.

    Args:
      path: of the file; it is not trusted.

    Returns:
      The certificate; its radius is the one that was used, rounded up to the dtype of the inputs.
      Nothing is claimed where a margin is `-inf`.

    Raises:
      ValueError: one line for whatever is wrong with the content.
      OSError: if the file cannot be opened.
    """
    claims, arrays = files.read(path)
    shapes = [arrays[name].shape for name in ("labels", "verified", "margins")]
    if [len(shape) for shape in shapes] != [1, 1, 2] or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            f"{os.path.basename(path)}: expected labels [B], verified [B] and margins [B, C], got "
            f"shapes {shapes}"
        )
    clip = (arrays["clip_low"], arrays["clip_high"]) if "clip_low" in arrays else None
    norm = math.inf if claims["norm"] == "inf" else float(claims["norm"])
    try:
        threat = Threat(arrays["eps"], norm, clip)
    except ValueError as error:
        raise ValueError(f"{os.path.basename(path)}: {error}") from None
    return Certificate(
        arrays["verified"],
        arrays["margins"],
        arrays["labels"],
        threat,
        claims["method"],
        claims["arithmetic"],
    )


def _values(value: Any) -> str:
    """A number, or the range of an array's numbers."""
    low, high = float(np.min(value)), float(np.max(value))
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def _range(clip: tuple[Any, Any]) -> str:
    return f"[{_values(clip[0])}, {_values(clip[1])}]"
