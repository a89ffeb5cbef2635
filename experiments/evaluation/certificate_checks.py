"""Checks that an evaluation file can be trusted; `certificates` describes the file.

The checks compare everything with what `experiments.evaluate` writes: the keys and values of the
metadata, the names, types and shapes of the arrays, and whether the arrays agree with each other.
Every function here raises a `FormatError` that says what was expected and what came.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from boundjax.attacks.objective import LOSSES
from boundjax.certification.presets import COMPLETE, NAMES
from experiments.evaluation.array_archive import ArrayArchive
from experiments.records.formats import (
    NOT_NEGATIVE,
    OBJECT,
    TEXT,
    FormatError,
    Rule,
    check_group,
    integer,
    is_number,
    is_text,
    one_of,
    parse_object,
    shown,
)
from experiments.settings.config import NORMS

ATTACK = "attack"
FORMAT = 1
METADATA, INDEX, LABELS, ATTACKED, CORRECT = "metadata", "index", "labels", "attacked", "correct"
RESISTED, RUN, VERIFIED, MARGINS = "resisted_", "_run", "_verified", "_margins"
FALSIFIED = "_falsified"
# The methods that look for counterexamples.
SEARCHED = (COMPLETE,)
# The values of `boundjax.Certificate.arithmetic`, the weakest first; the first one was the word of
# the first versions for the second.
ARITHMETICS = ("exact-real", "nearest", "real", "float32")
# Most characters of the metadata, which usually have about two thousand.
LONGEST = 1_000_000


class Layout(NamedTuple):
    """The arrays that a file holds according to its metadata and its directory.

    Attributes:
      count: the number of examples in the whole evaluation.
      losses: the attacked losses.
      methods: methods of `boundjax.certify`, in the order of the file.
    """

    count: int
    losses: tuple[str, ...]
    methods: tuple[str, ...]


# --------------------------------------------------------------------------- metadata


def _is_range(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(map(is_number, value)) and value == [0.0, 1.0]
    )


def _are_losses(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(loss, str) and loss in LOSSES for loss in value)
        and len(set(value)) == len(value)
    )


SHA256 = Rule(
    "a SHA-256 in hexadecimal digits",
    lambda value: isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None,
)

_SETTINGS = {
    "parameters_sha256": SHA256,
    "images_sha256": SHA256,
    "data": TEXT,
    "split": one_of(("test", "validation")),
    "count": integer(1),
    "which": TEXT,
    "eps": NOT_NEGATIVE,
    "norm": one_of(NORMS),
    "clip": Rule("[0.0, 1.0] or null", _is_range),
    "attack": OBJECT,
}
_ATTACK = {
    "name": TEXT,
    "losses": Rule(f"one or more of {', '.join(LOSSES)}, each once", _are_losses),
    "steps": integer(0),
    "step_size": TEXT,
    "restarts": integer(1),
    "batch_size": integer(1),
    "seed": integer(),
}
_RECORD = {
    "versions": Rule(
        "the versions of packages",
        lambda value: (
            isinstance(value, dict)
            and len(value) > 0
            # Python reports no version for a package whose metadata is damaged.
            and all(is_text(key) and (text is None or is_text(text)) for key, text in value.items())
        ),
    ),
    "device": TEXT,
    "seconds": NOT_NEGATIVE,
}
_BOUNDED = {"arithmetic": one_of(ARITHMETICS), "dtype": one_of(("float32", "float64"))}
_TIMED = {"timeout": NOT_NEGATIVE}


def read_metadata(archive: ArrayArchive) -> dict[str, Any]:
    """Reads the metadata of a file and checks everything that does not need the arrays."""
    if METADATA not in archive.names:
        raise FormatError(f"array {METADATA!r} is missing")
    header = archive.header(METADATA)
    if header.dtype.kind != "U" or header.shape != ():
        raise FormatError(f"{METADATA} must be one text, got {header}")
    if header.dtype.itemsize > 4 * LONGEST:
        raise FormatError(
            f"{METADATA} must be at most {LONGEST:,} characters, got {header.dtype.itemsize // 4:,}"
        )
    metadata = _parsed(archive.array(METADATA))
    _check_format(metadata)
    check_group("", metadata, {"format": integer(), "settings": OBJECT, "parts": OBJECT})
    check_group("settings.", metadata["settings"], _SETTINGS)
    check_group("settings.attack.", metadata["settings"]["attack"], _ATTACK)
    for name, record in metadata["parts"].items():
        if name != ATTACK and name not in NAMES:
            raise FormatError(f"keys of parts must be {ATTACK} or methods, got {shown(name)}")
        if not isinstance(record, dict):
            raise FormatError(f"parts.{name} must be an object, got {shown(record)}")
        # A method that has not run on any example yet has no arithmetic.
        bounded = name != ATTACK and any(key in record for key in _BOUNDED)
        rules = _RECORD | (_BOUNDED if bounded else {}) | (_TIMED if name in SEARCHED else {})
        check_group(f"parts.{name}.", record, rules)
    return metadata


def _parsed(text: np.ndarray) -> dict[str, Any]:
    try:
        return parse_object(text.item())
    except (FormatError, ValueError) as error:  # NumPy raises ValueError for invalid text
        raise FormatError(f"{METADATA}: {error}") from error


def _check_format(metadata: Mapping[str, Any]) -> None:
    number = metadata.get("format")
    if type(number) is int and number > FORMAT:
        raise FormatError(
            f"expected format {FORMAT}, got {shown(number)}, which a newer version wrote",
            "read it with that version",
        )
    if type(number) is not int or number != FORMAT:
        raise FormatError(f"expected format {FORMAT}, got {shown(number)}")


# --------------------------------------------------------------------------- arrays


def check_arrays(archive: ArrayArchive, metadata: Mapping[str, Any], part: bool) -> Layout:
    """Checks names, types and shapes before any data is read.

    Args:
      archive: the file.
      metadata: as `read_metadata` returns it.
      part: whether the file holds some of the examples only.
    """
    losses = tuple(metadata["settings"]["attack"]["losses"])
    methods = _methods(archive.names)
    flags = [ATTACKED, CORRECT, *(RESISTED + loss for loss in losses)]
    flags += [name + suffix for name in methods for suffix in (RUN, VERIFIED)]
    flags += [name + FALSIFIED for name in methods if name in SEARCHED]
    margins = [name + MARGINS for name in methods]
    expected = [METADATA, INDEX, LABELS, *flags, *margins]
    for name in expected:
        if name not in archive.names:
            raise FormatError(f"array {name!r} is missing")
    for name in archive.names:
        if name not in expected:
            raise FormatError(
                f"unknown array {shown(name)} in an evaluation with the losses "
                f"{', '.join(losses)} and the methods {', '.join(methods) or 'none'}"
            )

    count = metadata["settings"]["count"]
    examples = count
    index = archive.header(INDEX)
    if part and len(index.shape) == 1 and 1 <= index.shape[0] <= count:
        examples = index.shape[0]
    elif index.shape != (count,):
        raise FormatError(f"{INDEX} must be int [{count}], for settings.count {count}, got {index}")
    _require(archive, INDEX, "int", examples)
    _require(archive, LABELS, "int", examples)
    for name in flags:
        _require(archive, name, "bool", examples)
    classes = None
    for name in margins:
        shape = archive.header(name).shape
        if classes is None and len(shape) == 2 and shape[1] >= 2:
            classes = shape[1]
        _require(archive, name, "float32", examples, classes or "classes >= 2")
    return Layout(count, losses, methods)


def _methods(names: Sequence[str]) -> tuple[str, ...]:
    """Lists the methods whose arrays are in the file."""
    methods: dict[str, None] = {}
    for name in names:
        for suffix in (RUN, VERIFIED, MARGINS, FALSIFIED):
            method = name.removesuffix(suffix)
            if method == name:
                continue
            if method not in NAMES:
                raise FormatError(
                    f"array {shown(name)} is of an unknown method, expected one of "
                    f"{', '.join(NAMES)}"
                )
            methods[method] = None
    return tuple(methods)


def _require(archive: ArrayArchive, name: str, kind: str, *shape: int | str) -> None:
    header = archive.header(name)
    # Accept either byte order: the file may come from another machine.
    native = header.dtype.newbyteorder("=")
    matches = native.kind in "iu" if kind == "int" else native == kind
    if not matches or header.shape != shape:
        expected = f"{kind} [{', '.join(map(str, shape))}]"
        raise FormatError(f"{name} must be {expected}, got {header}")


# --------------------------------------------------------------------------- contents


def proven(margins: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Marks the `margins` `[N, C]` that are finite and positive off the label: bool `[N]`."""
    is_label = np.arange(margins.shape[-1])[None] == labels[:, None]
    return ((is_label | (margins > 0)) & np.isfinite(margins)).all(axis=-1)


def check_contents(
    layout: Layout, metadata: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Checks that arrays of the right types and shapes agree with each other and the metadata.

    Certificates are not compared with attacks here: if they contradict each other, the file may
    correctly record a wrong bound.
    """
    index, labels = arrays[INDEX], arrays[LABELS]
    wrong = (index < 0) | (index >= layout.count)
    wrong[1:] |= index[1:] <= index[:-1]
    order = "in order" if len(index) == layout.count else "in order, with gaps"
    _refuse(wrong, f"{INDEX} must be 0 to {layout.count - 1} {order}, got {_first(index, wrong)}")
    classes = [arrays[name + MARGINS].shape[1] for name in layout.methods]
    wrong = labels < 0
    if classes:
        wrong |= labels >= classes[0]
    allowed = f"0 to {classes[0] - 1}" if classes else ">= 0"
    _refuse(wrong, f"{LABELS} must be {allowed}, got {_first(labels, wrong)}")

    def refuse(name: str, rows: np.ndarray, what: str) -> None:
        count = np.count_nonzero(rows)
        _refuse(rows, f"{name} of example {_first(index, rows)} ({count} in all) {what}")

    for loss in layout.losses:
        name = RESISTED + loss
        wrong = arrays[name] & arrays[ATTACKED] & ~arrays[CORRECT]
        refuse(name, wrong, "is True, but it is misclassified")
    for name in layout.methods:
        run, margins = arrays[name + RUN], arrays[name + MARGINS]
        refuse(name, ~run & ~np.isnan(margins).all(axis=-1), "was not run, but has margins")
        at_label = margins[np.arange(len(labels)), labels]
        wrong = run & ~(at_label == 0)
        value = _first(at_label, wrong)
        refuse(name, wrong, f"must have margin 0 at its label, got {value}")
        wrong = proven(margins, labels) != arrays[name + VERIFIED]
        refuse(name, wrong, "contradicts its margins")
        if name in SEARCHED:
            falsified = arrays[name + FALSIFIED]
            refuse(name, falsified & ~run, "was not run, but has a counterexample")
            wrong = falsified & arrays[name + VERIFIED]
            refuse(name, wrong, "is verified, but has a counterexample")
    _check_records(layout, metadata["parts"], arrays)


def _check_records(
    layout: Layout, parts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Checks that there is a record of every part that ran, and of no other."""
    done = [name for name in layout.methods if arrays[name + RUN].any()]
    if ATTACK not in parts and (parts or done or arrays[ATTACKED].any()):
        raise FormatError(f"parts.{ATTACK} is missing, expected the record of the attacks")
    for name in parts:
        if name != ATTACK and name not in layout.methods:
            raise FormatError(f"parts.{name} is present, but the arrays of {name} are missing")
    for name in done:
        if name not in parts:
            raise FormatError(f"parts.{name} is missing, expected the record of {name}")
        if not _BOUNDED.keys() <= parts[name].keys():
            raise FormatError(f"parts.{name}.arithmetic is missing, but {name} was run")


def _first(values: np.ndarray, rows: np.ndarray) -> Any:
    """Returns the first value that `rows`, bool `[N]`, selects; an arbitrary one if it is empty."""
    return values[np.argmax(rows)]


def _refuse(rows: np.ndarray, reason: str) -> None:
    if rows.any():
        raise FormatError(reason)
