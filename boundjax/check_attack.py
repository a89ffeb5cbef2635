"""Shows again that the points of an attack are misclassified, and trusts nothing in its file.

This needs NumPy and `check.py` beside it: run `python -m boundjax.check_attack`, or this file by
its path. `docs/certificates.md` has the format, the assumptions and the exit statuses.
"""

import os
import sys

if not __package__ and os.path.dirname(os.path.abspath(__file__)) in sys.path[:1]:
    del sys.path[0]  # run by its path: modules beside this file would hide those of Python

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_FOLDER = os.path.dirname(os.path.abspath(__file__))
if __package__:
    from boundjax import check
else:
    sys.path.append(_FOLDER)
    check: Any = __import__("check")

Array = np.ndarray[Any, Any]

FORM = "boundjax-attack"
# Entry of the file -> its kind of numbers; all but the clip range must be there.
ENTRIES = {"labels": "i", "attack": "i", "points": "f", "eps": "f"}
ENTRIES |= {"clip_low": "f", "clip_high": "f"}
CLAIMS = {"method", "norm", "network", "inputs", "versions"}
# Values of `attack`: nothing is claimed, the input is misclassified, the next of `points` is.
NOTHING, ITSELF, MOVED = 0, 1, 2


def read_attack(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The claims and the arrays of an attack's file.

    Raises:
      ValueError: for a file of another format, or arrays that do not fit together.
    """
    arrays = check.read_arrays(path)
    claims = check.description(arrays, FORM, CLAIMS)
    check.require(claims["norm"] in ("inf", 1, 2), "unknown norm")
    for name, value in arrays.items():
        fits = value.dtype.kind == ENTRIES.get(name) and np.isfinite(value).all()
        check.require(fits, f"{name!r}: unknown entry, wrong type, or not finite")
    missing = [name for name in list(ENTRIES)[:4] if name not in arrays]
    check.require(not missing, f"expected the entries {', '.join(missing)}")
    check.require(("clip_low" in arrays) == ("clip_high" in arrays), "clip needs both ends")
    labels, attack, points = (arrays[name] for name in ("labels", "attack", "points"))
    fits = labels.ndim == 1 and labels.size and attack.shape == labels.shape
    fits = fits and np.isin(attack, (NOTHING, ITSELF, MOVED)).all() and (labels >= 0).all()
    check.require(fits, "labels and attack must be [B], attack 0, 1 or 2")
    moved = int((attack == MOVED).sum())
    check.require(points.shape[:1] == (moved,), f"expected {moved} points")
    check.require((arrays["eps"] >= 0).all(), "eps below 0")
    return claims, arrays


def misclassified(nodes: list[Any], points: Array, labels: Array) -> Array:
    """Whether another class reaches the label's logit, for points `[N, size]`: bool `[N]`.

    In real arithmetic, up to 1e-5 of the largest logit: the attack computed in float32.
    """
    last, logits, shown = len(nodes) - 1, np.eye(nodes[-1].size), np.zeros(len(points), bool)
    step = max(1, check.BLOCK // max(node.work for node in nodes))
    for part in (slice(start, start + step) for start in range(0, len(points), step)):
        at, zero, label = points[part], np.zeros_like(points[part]), logits[labels[part]]
        walk = check.Bounds(nodes, (at, zero, at, at, math.inf), "interval", 0.0, 0.0)
        below = walk.bound(last, logits - label[:, None], flat=True)
        reached = below + check.TOLERANCE * walk.reach[-1].max(axis=1, keepdims=True) >= 0
        shown[part] = (reached & (label == 0)).any(axis=1)
    return shown


def inside(points: Array, sets: Sequence[Array], norm: float) -> Array:
    """Whether points `[N, size]` lie in their sets, by distances in float64: bool `[N]`."""
    x, eps, low, high = sets
    share = np.where(points == x, 0.0, np.abs(points - x) / eps)
    in_box = ((low <= points) & (points <= high)).all(axis=1)
    return in_box & (np.linalg.norm(share, norm, axis=1) <= 1.0)


def check_attack(options: argparse.Namespace) -> int:
    """Checks an attack's file and prints what is shown; returns the exit status."""
    claims, arrays = read_attack(options.file)
    sys.path.append(_FOLDER)
    onnx = options.onnx and __import__("check_onnx").read_onnx(options.onnx, check.append)
    nodes, network = onnx or check.read_weights(options.weights)
    check.require(claims["network"] == network, "it is about another network")
    x = check.read_arrays(options.data)["x"]
    check.require(check.digest({"x": x}) == claims["inputs"], "it is about other inputs")
    labels, attack, count = arrays["labels"], arrays["attack"], len(arrays["labels"])
    fits = x.dtype.kind == "f" and np.isfinite(x).all() and len(x) == count
    fits = fits and x[0].size == nodes[0].size and labels.max() < nodes[-1].size > 1
    check.require(fits and arrays["points"].shape[1:] == x.shape[1:], "claims of other shapes")
    norm = math.inf if claims["norm"] == "inf" else claims["norm"]
    sets = check.sets_of(arrays, x)
    points = sets[0].copy()
    points[attack == MOVED] = arrays["points"].reshape(-1, nodes[0].size)
    claimed = np.flatnonzero(attack != NOTHING)
    contained = inside(points[claimed], [a[claimed] for a in sets], norm)
    shown = misclassified(nodes, points[claimed], labels[claimed])
    for example, in_set, wrong in zip(claimed, contained, shown, strict=True):
        if not in_set:
            print(f"example {example}: its point lies outside of its set")
        elif not wrong:
            print(f"example {example}: its point is not misclassified")
    good = int((contained & shown).sum())
    print(
        f"{good} of {count} examples have a misclassified point ({(attack == ITSELF).sum()} the "
        f"input itself): the error under attack is at least {100 * good / count:.2f} %; "
        f"{len(claimed) - good} points do not show what they claim"
    )
    return 0 if good == len(claimed) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m boundjax.check_attack`; returns the exit status."""
    parser = argparse.ArgumentParser(
        "boundjax.check_attack", description="Shows that the points of an attack are misclassified."
    )
    parser.add_argument("file", help="the attack")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--weights", help="the network, by boundjax.export_weights")
    network.add_argument("--onnx", help="the network, an ONNX file")
    parser.add_argument("--data", required=True, help="an npz with the inputs `x`")
    options = parser.parse_args(arguments)
    try:
        with np.errstate(all="ignore"):
            return check_attack(options)
    except Exception as error:  # whatever an untrusted file may provoke
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        print(f"cannot check {options.file}: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
