"""`supports`: what this verifier can do, as VNN-LIB 2.0 asks (its chapter 5)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence


def _operators() -> list[str]:
    from boundjax.onnx.expansions import EXPANSIONS
    from boundjax.onnx.operators import OPERATORS

    return sorted({*OPERATORS, *EXPANSIONS})


def _opset_versions() -> list[str]:
    import onnx

    # Version 7 changed how operands are broadcast.
    return ["7", str(onnx.defs.onnx_opset_version())]


# By flag: what it prints, and its help.
_CAPABILITIES: dict[str, tuple[Callable[[], Sequence[str]], str]] = {
    "onnx-operators": (_operators, "operators of ONNX"),
    "onnx-opset-versions": (_opset_versions, "the oldest and the newest operator set of ONNX"),
    "vnnlib-versions": (lambda: ["1.0", "2.0"], "the oldest and the newest version of VNN-LIB"),
    "multiple-network-theories": (
        lambda: ["SNET", "MNET", "MENET", "MINET"],
        "one network, several, equal ones, isomorphic ones",
    ),
    "hidden-node-theories": (lambda: ["H"], "constraints on hidden values"),
    "multiple-input-output-theories": (
        lambda: ["SIO", "MIO"],
        "one input and output, or several",
    ),
    "arithmetic-complexity-theories": (
        lambda: ["BND", "OUTC", "LIN", "POLY * products of two variables"],
        "bounds, comparisons of outputs, linear and polynomial constraints",
    ),
    "serialise-assignments": (lambda: ["false"], "whether assignments are written to files"),
}


def main(arguments: Sequence[str]) -> int:
    """The command `boundjax supports`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="boundjax supports", description="Prints what the verifier supports, line by line."
    )
    group = parser.add_mutually_exclusive_group(required=True)
    for name, (_, help) in _CAPABILITIES.items():
        group.add_argument(
            f"--{name}", dest="capability", action="store_const", const=name, help=help
        )
    lines, _ = _CAPABILITIES[parser.parse_args(arguments).capability]
    sys.stdout.write("\n".join(lines()) + "\n")
    return 0
