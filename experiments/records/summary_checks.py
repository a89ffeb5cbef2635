"""Checks the summary of a finished run when it is read again."""

from __future__ import annotations

from typing import Any

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
    shown,
)
from experiments.settings.config import NORMS

_ERRORS = ("standard_error", "pgd_error", "verified_error")


def _is_fraction(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


_FRACTION = Rule("a fraction in [0, 1]", _is_fraction)
_BY_METHOD = Rule(
    "fractions in [0, 1], or null, by method",
    lambda value: (
        isinstance(value, dict)
        and all(map(is_text, value))
        and all(error is None or _is_fraction(error) for error in value.values())
    ),
)
_VERSIONS = Rule(
    "the versions of python, jax, flax, numpy and other packages",
    lambda value: isinstance(value, dict) and {"python", "jax", "flax", "numpy"} <= value.keys(),
)
# The keys that are read again. A summary has more keys, and a newer version may add some.
_SUMMARY = {
    "experiment": TEXT,
    "data": TEXT,
    "test_images": integer(1),
    "norm": one_of(NORMS),
    "eps_test": NOT_NEGATIVE,
    "eps_train": NOT_NEGATIVE,
    "clip": Rule(
        "two numbers or null",
        lambda value: (
            value is None
            or (isinstance(value, list) and len(value) == 2 and all(map(is_number, value)))
        ),
    ),
    "bounds": Rule("names of methods; none of a random network", _is_texts),
    "attack": TEXT,
    "method": TEXT,
    "model": TEXT,
    "selection": TEXT,
    "device": TEXT,
    "versions": _VERSIONS,
    "train_seconds": NOT_NEGATIVE,
    "finished": TEXT,
}
_ONE_SEED = {
    "results": OBJECT,
    "seed": integer(),
    "parameters_sha256": TEXT,
    "evaluation_seconds": NOT_NEGATIVE,
}
_SEVERAL_SEEDS = {
    "seeds": Rule(
        "a list of integers",
        lambda value: (
            isinstance(value, list) and len(value) > 0 and all(type(seed) is int for seed in value)
        ),
    ),
    "errors": OBJECT,
    "mean": OBJECT,
    "std": OBJECT,
}


def check_summary(summary: dict[str, Any], several: bool) -> None:
    """Checks those keys of the summary of one run, or of `several` seeds, that are read again.

    Raises:
      FormatError: naming the key, what was expected and what is there.
    """
    rules = _SUMMARY | (_SEVERAL_SEEDS if several else _ONE_SEED)
    # The oldest runs do not name their data; runs of several seeds are newer.
    check_group("", summary, rules, optional=() if several else ("data",), allow_unknown=True)
    if several:
        count = len(summary["seeds"])
        fractions = Rule(
            f"{count} fractions in [0, 1], one per seed",
            lambda value: (
                isinstance(value, list) and len(value) == count and all(map(_is_fraction, value))
            ),
        )
        check_group("errors.", summary["errors"], dict.fromkeys(_ERRORS, fractions))
        check_group("mean.", summary["mean"], dict.fromkeys(_ERRORS, _FRACTION))
        check_group("std.", summary["std"], dict.fromkeys(_ERRORS, NOT_NEGATIVE))
        return
    results = summary["results"]
    if not results:
        raise FormatError("results must be of one network or more, got none")
    methods = None
    for label, errors in results.items():
        if not is_text(label) or not isinstance(errors, dict):
            raise FormatError(
                f"results must be errors by network, got {shown(errors)} of {shown(label)}"
            )
        rules = dict.fromkeys(_ERRORS, _FRACTION) | {"verified_error_by": _BY_METHOD}
        check_group(f"results.{label}.", errors, rules, allow_unknown=True)
        methods = errors["verified_error_by"].keys() if methods is None else methods
        if errors["verified_error_by"].keys() != methods:
            raise FormatError("results must have the same methods for every network")
