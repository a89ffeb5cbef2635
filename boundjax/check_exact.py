"""Proves the claims of a certificate in rational numbers, so that nothing is assumed of rounding.

For small networks of linear ops, maxima and piecewise linear functions. This needs NumPy and
`check.py` beside it: run `python -m boundjax.check_exact`, or this file by its path.
`docs/certificates.md` has the formats and the exit statuses.
"""

import os
import sys

if not __package__ and os.path.dirname(os.path.abspath(__file__)) in sys.path[:1]:
    del sys.path[0]  # run by its path: modules beside this file would hide those of Python

import argparse
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

_FOLDER = os.path.dirname(os.path.abspath(__file__))
if __package__:
    from boundjax import check
else:
    sys.path.append(_FOLDER)
    check: Any = __import__("check")

Array = np.ndarray[Any, Any]  # of fractions, unless its name or a comment says otherwise

# Products of fractions for one example, about one in a microsecond; more take hours.
MOST_PRODUCTS = 10**9


def exact(numbers: Any) -> Array:
    """Floating-point numbers as fractions; infinities stay."""
    values = np.asarray(numbers, np.float64)
    result = np.empty(values.size, object)
    for k, value in enumerate(values.reshape(-1).tolist()):
        result[k] = value if math.isinf(value) else Fraction(value)
    return result.reshape(values.shape)


def elementwise(function: Callable[..., Any], *arrays: Array) -> Array:
    """A function of fractions, applied elementwise to arrays of one shape."""
    result = np.empty(arrays[0].size, object)
    flat = (array.reshape(-1).tolist() for array in arrays)
    for k, values in enumerate(zip(*flat, strict=True)):
        result[k] = function(*values)
    return result.reshape(arrays[0].shape)


def larger(first: Array, second: Array) -> Array:
    """The larger of two arrays, elementwise."""
    return elementwise(max, first, second)


def smaller(first: Array, second: Array) -> Array:
    """The smaller of two arrays, elementwise."""
    return elementwise(min, first, second)


class Node:
    """A node of the network with its numbers as fractions.

    Attributes:
      checked: what `check` made of it, which has validated it.
      kernel, factor, constant: of a linear op.
      kinks: the ends of a ramp's middle piece, `low` and `high`, which may be infinite.
      slope: of a ramp below `low`.
    """

    def __init__(self, checked: Any, arrays: dict[str, Array]) -> None:
        self.checked, self.op, self.inputs = checked, checked.op, checked.inputs
        if self.op not in (*check.LINEAR, "input", "max", "ramp"):
            raise ValueError(f"rationals have no {self.op!r}; use boundjax.check")
        size = checked.size

        def of(name: str, default: float) -> Array:
            return np.resize(exact(arrays.get(name, np.array([default]))).reshape(-1), size)

        self.kernel = exact(checked.kernel)
        self.factor = of("factor", 1.0) / of("divisor", 1.0) if self.op == "affine" else None
        self.constant = of("constant", 0.0) if self.op == "affine" else None
        self.kinks = of("low", 0.0), of("high", math.inf)
        self.slope = of("slope", 0.0)

    def forward(self, kernel: Array, x: Array) -> Array:
        """The product of a value `[size]` with a kernel of this node's shape."""
        node = self.checked
        patches = check.windows(x, node.index, node.width).reshape(-1, node.taps * node.width)
        return (patches @ kernel.reshape(-1, node.outputs)).reshape(-1)

    def backward(self, rows: Array) -> Array:
        """Coefficients `[R, size]` on the value of a product, pulled back to its operand."""
        node = self.checked
        product = rows.reshape(-1, node.outputs) @ self.kernel.reshape(-1, node.outputs).T
        product = product.reshape(len(rows), -1, node.width)
        used = check.windows(product.reshape(len(rows), -1), node.uses, node.width)
        return used.sum(axis=-2).reshape(len(rows), -1)

    def interval(self, lows: Sequence[Array], highs: Sequence[Array]) -> tuple[Array, Array]:
        """The interval of the value, from those of the operands."""
        if self.op == "add":
            return lows[0] + lows[1], highs[0] + highs[1]
        low, high = lows[0], highs[0]
        if self.op == "product":
            up = elementwise(lambda v: max(v, 0), self.kernel)
            down = self.kernel - up
            return (
                self.forward(up, low) + self.forward(down, high),
                self.forward(up, high) + self.forward(down, low),
            )
        if self.op == "affine":
            ends = low * self.factor, high * self.factor
            return smaller(*ends) + self.constant, larger(*ends) + self.constant
        if self.op == "max":
            low, high = (np.array([max(w) for w in self.windows(a)], object) for a in (low, high))
            return low, high
        zero = exact(np.zeros(len(low)))
        return self.extremes(low, high, zero)

    def windows(self, x: Array) -> list[list[Any]]:
        """The entries of every window of a maximum, without padding."""
        return [[x[k] for k in window if k >= 0] for window in self.checked.index.tolist()]

    def extremes(self, low: Array, high: Array, slope: Array) -> tuple[Array, Array]:
        """The least and the largest value of `f(x) - slope x` on `[low, high]` of a ramp `f`."""

        def of_one(low: Any, high: Any, slope: Any, first: Any, last: Any, rise: Any) -> Any:
            points = [low, high, *(kink for kink in (first, last) if low < kink < high)]
            values = [(first + rise * x if x < first else min(x, last)) - slope * x for x in points]
            return min(values), max(values)

        pairs = elementwise(of_one, low, high, slope, *self.kinks, self.slope)
        least, most = (elementwise(lambda pair, k=k: pair[k], pairs) for k in (0, 1))
        return least, most

    def lines(self, low: Array, high: Array, rule: str) -> tuple[Array, ...]:
        """Slopes and offsets of a line below and of one above a ramp."""
        ends = (np.array([[float(v) for v in end]]) for end in (low, high))
        slopes = np.zeros((2, 1, len(low)))
        if rule != "none":
            slopes = np.nan_to_num(self.checked.slopes(*ends, rule, 0.0))
        below, above = exact(slopes[0, 0]), exact(slopes[1, 0])
        least, most = self.extremes(low, high, below)[0], self.extremes(low, high, above)[1]
        return below, above, least, most

    def of_maximum(self, low: Array, high: Array) -> tuple[Array, ...]:
        """The same of a maximum: coefficients `[size, K]` on its windows, and offsets."""
        index = self.checked.index
        below, above = exact(np.zeros(index.shape)), exact(np.zeros(index.shape))
        offset = exact(np.zeros(len(index)))
        for k, window in enumerate(index.tolist()):
            entries = [tap for tap, i in enumerate(window) if i >= 0]
            below[k, max(entries, key=lambda tap: low[window[tap]])] = Fraction(1)
            top = max(entries, key=lambda tap: high[window[tap]])
            start, most = low[window[top]], high[window[top]]
            rest = max((high[window[tap]] for tap in entries if tap != top), default=start)
            # The other entries are at most `rest`, and max(x_top, rest) lies below its chord.
            chord = Fraction(1) if start >= rest else (most - rest) / (most - start)
            above[k, top] = chord
            offset[k] = Fraction(0) if start >= rest else rest - chord * start
        return below, above, 0 * offset, offset


def spread_above(scaled: Array, low: Array, high: Array) -> Any:
    """An upper bound on `<scaled, p>` over `|p|_2 <= 1` and `low <= p <= high`.

    Every multiplier of the dual gives one; the best is found in floating point.
    """
    numbers = [np.array(a, np.float64) for a in (scaled, low, high)]
    multiplier = 1.0
    for _ in range(30):
        multiplier *= float(np.linalg.norm(np.clip(numbers[0] / multiplier, *numbers[1:])))
        multiplier = max(multiplier, 1e-300)
    factor = Fraction(multiplier)
    point = smaller(larger(scaled / factor, low), high)
    return scaled @ point - factor / 2 * (point @ point) + factor / 2


class Bounds:
    """Intervals of all nodes for one example, and rows that are pulled back to its input."""

    def __init__(self, nodes: Sequence[Node], sets: Sequence[Array], norm: float, word: str):
        self.nodes, self.sets, self.norm = nodes, sets, norm
        self.rule, linear, intersects = check.WITNESSES[word]
        self.low, self.high, self.lines = [sets[2]], [sets[3]], list[tuple[Array, ...]]([()])
        bent = {i: node for node in nodes if node.op in ("max", "ramp") for i in node.inputs}
        first = [True]
        for k, node in enumerate(nodes):
            if k:
                ends = ([a[i] for i in node.inputs] for a in (self.low, self.high))
                low, high = node.interval(*ends)
                self.low.append(low)
                self.high.append(high)
                self.lines.append(self._lines(node))
                linear_so_far = node.op in check.LINEAR and all(first[i] for i in node.inputs)
                first.append(linear_so_far)
            ball = first[k] and norm < math.inf  # tighter than its box
            if k in bent and (linear or ball):
                rows = exact(np.eye(len(self.low[k])))
                below, above = self.bound(k, rows), -self.bound(k, -rows)
                if intersects or bent[k].op == "max":
                    below, above = larger(below, self.low[k]), smaller(above, self.high[k])
                self.low[k], self.high[k] = below, above

    def _lines(self, node: Node) -> tuple[Array, ...]:
        if node.op in check.LINEAR:
            return ()
        low, high = self.low[node.inputs[0]], self.high[node.inputs[0]]
        return node.of_maximum(low, high) if node.op == "max" else node.lines(low, high, self.rule)

    def bound(self, k: int, rows: Array, flat: bool = False) -> Array:
        """Lower bounds `[R]` on `<rows, value of node k>`; `flat`: from intervals alone."""
        pending, constant = {k: rows}, exact(np.zeros(len(rows)))
        for j in (j for j in range(k, 0, -1) if j in pending):
            node, rows = self.nodes[j], pending.pop(j)
            operands = []
            if node.op in check.LINEAR:
                operands = [rows] * len(node.inputs)
                if node.op == "product":
                    operands = [node.backward(rows)]
                elif node.op == "affine":
                    operands, constant = [rows * node.factor], constant + rows @ node.constant
            else:
                up = elementwise(lambda v: max(v, 0), rows)
                down, ends = rows - up, [self.low[j], self.high[j]]
                if not flat:
                    below, above, *ends = self.lines[j]
                    operands = [self._through(node, up, down, below, above)]
                constant = constant + up @ ends[0] + down @ ends[1]
            for i, operand in zip(node.inputs, operands, strict=False):
                pending[i] = operand + pending[i] if i in pending else operand
        return constant + self.least(pending[0]) if 0 in pending else constant

    def _through(self, node: Node, up: Array, down: Array, below: Array, above: Array) -> Array:
        """Coefficients on the operand of a nonlinear op, by its lines."""
        if node.op == "ramp":
            return up * below + down * above
        taps = up[..., None] * below + down[..., None] * above
        return check.windows(taps.reshape(len(up), -1), node.checked.uses).sum(axis=(-2, -1))

    def least(self, rows: Array) -> Array:
        """Lower bounds `[R]` on `<rows, x>`: the larger of those over box and ball."""
        x, eps, low, high = self.sets
        up = elementwise(lambda v: max(v, 0), rows)
        box = up @ low + (rows - up) @ high
        if self.norm == math.inf:
            return box
        scaled = -rows * eps
        if self.norm == 2:
            ends = ((end - x) / elementwise(lambda e: e or Fraction(1), eps) for end in (low, high))
            below, above = ends
            spread = np.array([spread_above(row, below, above) for row in scaled], object)
        else:
            spread = np.array([max(abs(v) for v in row) for row in scaled], object)
        return larger(box, rows @ x - spread)


def network_of(options: argparse.Namespace) -> tuple[list[Node], list[str]]:
    """The nodes of the network, and what it is."""
    kept: list[dict[str, Array]] = []

    def append(nodes: list[Any], op: str, inputs: Sequence[int], **arrays: Any) -> int:
        kept.append(arrays)
        return check.append(nodes, op, inputs, **arrays)

    if options.onnx:
        checked, network = __import__("check_onnx").read_onnx(options.onnx, append)
    else:
        checked, network = check.read_weights(options.weights)
        arrays = check.read_arrays(options.weights)
        for k in range(len(checked)):
            names = [name for name in arrays if name.startswith(f"{k}.")]
            kept.append({name.partition(".")[2]: arrays[name] for name in names})
    return [Node(*pair) for pair in zip(checked, kept, strict=True)], network


def exact_sets(arrays: dict[str, Array], x: Array, example: int) -> tuple[Array, ...]:
    """The input, the radii, and the ends of the box of one example, exactly."""
    eps, shape = arrays["eps"], x.shape
    eps = eps.reshape(-1, *[1] * (x.ndim - 1)) if eps.ndim == 1 else eps
    infinite = np.float64(np.inf)
    ends = arrays.get("clip_low", -infinite), arrays.get("clip_high", infinite)
    center, radius, low, high = (
        exact(np.broadcast_to(a, shape)[example].reshape(-1)) for a in (x, eps, *ends)
    )
    return center, radius, larger(center - radius, low), smaller(center + radius, high)


def check_exact(options: argparse.Namespace) -> int:
    """Checks a certificate and prints what is proved; returns the exit status."""
    claims, arrays = check.read_certificate(options.file)
    sys.path.append(_FOLDER)
    nodes, network = network_of(options)
    check.require(claims["network"] == network, "it is about another network")
    check.require(
        claims["arithmetic"] != "float32",
        "it claims float32 programs, and rationals prove real numbers alone; use boundjax.check",
    )
    x = arrays["x"] if "x" in arrays else check.read_arrays(options.data)["x"]
    check.require(check.digest({"x": x}) == claims["inputs"], "it is about other inputs")
    labels, verified, margins = (arrays[name] for name in ("labels", "verified", "margins"))
    count, outputs = len(x), nodes[-1].checked.size
    fits = x.dtype.kind == "f" and np.isfinite(x).all() and x[0].size == nodes[0].checked.size
    fits = fits and labels.shape == verified.shape == (count,) and labels.max() < outputs > 1
    fits = fits and margins.shape in ((count, 0), (count, outputs))
    check.require(fits, "claims of other shapes")
    check.sets_of(arrays, x)  # the inputs lie in the clip range
    norm = math.inf if claims["norm"] == "inf" else claims["norm"]
    work = sum(node.checked.work * node.checked.outputs for node in nodes)
    walks = sum(node.checked.size for node in nodes if node.op in ("max", "ramp"))
    linear = any(check.WITNESSES[word][1] for word in claims["witness"])
    products = work * (outputs + (walks if linear else 0))
    check.require(
        products <= MOST_PRODUCTS,
        f"an example takes {products:.0e} products of fractions, expected at most "
        f"{MOST_PRODUCTS:.0e}; use boundjax.check",
    )
    sample = np.random.default_rng(options.seed).permutation(count)[: max(options.sample, 1)]
    claimed, lines = (verified | (margins > -np.inf).any(axis=1))[sample], list[str]()
    for example in np.sort(sample[claimed]).tolist():
        sets, label = exact_sets(arrays, x, example), int(labels[example])
        rows = np.eye(outputs)[label] - np.eye(outputs)
        best, slack = [None] * outputs, Fraction(0)
        for word in claims["witness"]:
            walk = Bounds(nodes, sets, norm, word)
            for flat in (True, False)[: 1 + (word != "interval")]:
                bounds = walk.bound(len(nodes) - 1, exact(rows), flat)
                best = [b if a is None else max(a, b) for a, b in zip(best, bounds, strict=True)]
            size = max(max(abs(v) for v in end) for end in (walk.low[-1], walk.high[-1]))
            slack = Fraction(check.TOLERANCE) * size
        for m, bound in enumerate(best):
            margin = margins[example, m] if margins.size else -np.inf
            reached = margin == -np.inf or bound + slack >= Fraction(float(margin))
            if not reached or (verified[example] and m != label and bound <= 0):
                lines.append(
                    f"example {example}, class {m}: "
                    + "verified, " * int(verified[example])
                    + f"margin {margin:.6g}; proved is {float(bound):.6g}"
                )
    print(
        "for real numbers; computed in rationals",
        *lines,
        f"{len(sample)} of {count} examples checked (seed {options.seed}), "
        f"{verified[sample].sum()} claimed robust: {len(lines)} margins not proved",
        sep="\n",
    )
    return 1 if lines else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m boundjax.check_exact`; returns the exit status."""
    parser = argparse.ArgumentParser(
        "boundjax.check_exact", description="Proves a certificate again in rational numbers."
    )
    parser.add_argument("file", help="the certificate")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--weights", help="the network, by boundjax.export_weights")
    network.add_argument("--onnx", help="the network, an ONNX file")
    parser.add_argument("--data", default="--data", help="`x`, if the certificate lacks it")
    parser.add_argument("--sample", type=int, default=check.MAX_SIZE, help="check so many")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    options = parser.parse_args(arguments)
    try:
        with np.errstate(all="ignore"):
            return check_exact(options)
    except Exception as error:  # whatever an untrusted file may provoke
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        print(f"cannot check {options.file}: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
