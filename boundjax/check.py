"""Proves the claims of a certificate file again, and trusts nothing in it; needs NumPy alone.

A bound in float64, less what rounding may have lost, proves what it says: `docs/certificates.md`.
"""

import os
import sys

if not __package__ and os.path.dirname(os.path.abspath(__file__)) in sys.path[:1]:
    del sys.path[0]  # run by its path: modules beside this file would hide those of Python

import argparse
import hashlib
import itertools
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# Op -> the arrays of a node; `docs/certificates.md` says what each computes.
OPS = {"input": ("size",), "product": ("index", "kernel"), "add": (), "max": ("index",)}
OPS |= {"affine": ("factor", "divisor", "constant"), "ramp": ("low", "high", "slope")}
OPS |= {"tanh": (), "sigmoid": (), "exp": ()}
LINEAR = ("product", "affine", "add")
# Witness -> slopes of free lines, whether intermediate bounds are linear, and intersected.
WITNESSES = {"interval": ("none", False, True), "crown-ibp": ("adaptive", False, True)}
WITNESSES |= {"crown": ("adaptive", True, True), "fast-lin": ("parallel", True, False)}
# Entry of a certificate -> its kind of numbers; the first four must be there.
ENTRIES = {"labels": "i", "verified": "b", "margins": "f", "eps": "f"}
ENTRIES |= {"x": "f", "clip_low": "f", "clip_high": "f"}
CLAIMS = {"method", "arithmetic", "norm", "witness", "network", "inputs", "versions"}
MAX_BYTES, MAX_NODES, MAX_SIZE = 2**31, 10_000, 2**26
UNIT, TINY, BLOCK = 2.0**-53, 2.0**-1022, 2**22  # the last: elements of the largest array of rows
SIGNS = (1.0, -1.0, *np.random.default_rng(0).choice((-1.0, 1.0), (4, 4093)))
TIES = (0.0, *(size * signs for size in (1e-5, 1e-4, 1e-3, 1e-2) for signs in SIGNS))
TOLERANCE = 1e-5  # by which a margin may exceed what is proved, relative to the largest logit


def require(condition: Any, message: str) -> None:
    """Raises ValueError with this message of one line unless the condition holds."""
    if not condition:
        raise ValueError(message)


def read_arrays(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> dict[str, Array]:
    """The arrays of an npz file, not unpickled, with sizes checked before allocation."""
    arrays, total = dict[str, Array](), 0
    with zipfile.ZipFile(path) as archive:
        require(len(archive.infolist()) <= 4 * MAX_NODES, "too many entries")
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            with archive.open(entry) as stream:
                require(np.lib.format.read_magic(stream) == (1, 0), f"{name!r}: version of npy")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
                plain = dtype.kind in "biuf" and dtype.itemsize <= 8 and not fortran
                plain = plain and dtype == dtype.newbyteorder("<") and min(shape, default=0) >= 0
                require(plain and name not in arrays, f"{name!r}: no plain numbers, or there twice")
                total += (size := math.prod(shape) * dtype.itemsize)
                require(total <= max_bytes, f"it declares arrays of more than {max_bytes} bytes")
                content, more = stream.read(size), stream.read(1)
                require(len(content) == size and not more, f"{name!r}: size not as declared")
            arrays[name] = np.frombuffer(content, dtype).reshape(shape)
            require(not np.isnan(arrays[name]).any(), f"{name!r} holds NaN")
    return arrays


def digest(arrays: Mapping[str, Array]) -> str:
    """The sha256 of arrays: of names, types, shapes and elements, in the order of the names."""
    total = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        total.update(f"{name} {value.dtype.str} {value.shape}\n".encode() + value.tobytes())
    return total.hexdigest()


def description(arrays: dict[str, Array], form: str, keys: set[str]) -> dict[str, Any]:
    """Removes the entry `json` of a file of this format; it must have exactly these keys."""
    content = json.loads(arrays.pop("json", np.zeros(0)).tobytes() or b"{}")
    fits = content.get("format") == form and content.get("version") == 1
    require(fits and set(content) == {"format", "version", *keys}, f"no {form} of version 1")
    return content


def read_certificate(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The claims and the arrays of a certificate."""
    arrays = read_arrays(path)
    claims = description(arrays, "boundjax-certificate", CLAIMS)
    words, arithmetic, norm = (claims[key] for key in ("witness", "arithmetic", "norm"))
    fits = arithmetic in ("nearest", "real", "float32") and norm in ("inf", 1, 2) and words
    require(fits and set(words) <= set(WITNESSES), "unknown arithmetic, norm or witness")
    require({*[*ENTRIES][:4]} <= set(arrays), f"expected the entries {', '.join([*ENTRIES][:4])}")
    for name, value in arrays.items():
        require(value.dtype.kind == ENTRIES.get(name), f"{name!r}: unknown entry or wrong type")
        require(name == "margins" or np.isfinite(value).all(), f"{name} must be finite")
    require(("clip_low" in arrays) == ("clip_high" in arrays), "clip needs both ends")
    require((arrays["eps"] >= 0).all() and (arrays["labels"] >= 0).all(), "eps or labels below 0")
    return claims, arrays


class Node:
    """One op on flat values; an element sums `terms` products (0: exact), in rows `overlap`."""

    def __init__(self, op: str, inputs: Sequence[int], sizes: list[int], arrays: Any) -> None:
        require(op in OPS and set(OPS[op]) == set(arrays), f"no op {op!r} of {set(arrays)}")
        fits = len(sizes) == {"input": 0, "add": 2}.get(op, 1) and len(set(sizes)) <= 1
        require(fits, f"{op}: number or sizes of operands")
        a = {}
        for name, value in arrays.items():
            kind = "i" if name in ("index", "size") else "f"
            finite = name in ("low", "high") or np.isfinite(value).all()
            require(value.dtype.kind == kind and value.size and finite, f"{op}: type of {name}")
            a[name] = value.astype(f"{kind}8")
        self.op, self.inputs, self.terms, self.overlap = op, tuple(inputs), 0, 0
        self.size = self.operand = sizes[0] if sizes else int(a["size"][0])
        self.index = a.get("index", np.zeros((1, 1), int))
        self.kernel = a.get("kernel", np.ones((self.index.shape[1], 1, 1)))
        self.taps, self.width, self.outputs = self.kernel.shape
        if "index" in a:
            sites, fits = self.operand // self.width, self.index.shape[1:] == (self.taps,)
            fits = fits and (self.index >= -1).all() and (self.index < sites).all()
            require(fits and self.operand % self.width == 0, f"{op}: index or kernel")
            require(op != "max" or (self.index >= 0).any(axis=1).all(), "max: an empty window")
            # The places and taps that use a site, as a row of an index like that of the taps.
            order = np.argsort(self.index, axis=None, kind="stable")[(self.index < 0).sum() :]
            site = self.index.reshape(-1)[order]
            rank = np.arange(len(site)) - np.searchsorted(site, site)
            most = int(rank.max()) + 1
            require(sites * most <= MAX_SIZE, f"{op}: an index of more than {MAX_SIZE} elements")
            self.uses = np.full((sites, most), -1)
            self.uses[site, rank] = order
            self.size, self.overlap = len(self.index) * self.outputs, most * self.outputs
            self.terms = self.taps * self.width
            self.terms *= self.terms > 1 or bool((np.abs(self.kernel) != 1).any())
        elif op != "input":
            a = {k: np.tile(v.reshape(-1), self.size // v.size) for k, v in a.items()}
            require(all(v.size == self.size for v in a.values()), f"{op}: sizes of arrays")
        self.work = self.size + self.index.size * self.width  # elements for one row
        require(self.size > 0 and self.work <= 4 * MAX_SIZE, f"{op}: size {self.size}")
        factor, divisor, self.constant = (a.get(k, np.ones(1)) for k in OPS["affine"])
        self.factor, self.constant = factor / divisor, self.constant * (op == "affine")
        require((np.abs(divisor) >= 2.0**-126).all(), f"{op}: a divisor is 0 or subnormal")
        if (np.abs(self.factor) != 1).any():
            self.terms = self.overlap = 16  # a factor may be computed from several weights
        self.terms += op == "add" or bool(self.constant.any())
        self.low, self.high, self.slope = (a.get(k, np.zeros(1)) for k in OPS["ramp"])
        fits = (self.low <= self.high).all() and ((self.low == 0) | (self.slope == 0)).all()
        require(fits and (self.low < np.inf).all(), f"{op}: low > high, or a slope with low")
        self.largest = float(max(np.abs(self.kernel).max(), np.abs(self.factor).max()))

    def forward(self, values: Sequence[Array], absolute: bool = False) -> Array:
        """The value of a linear op; `absolute`: of its absolute weights, without the constant."""
        of = np.abs if absolute else np.asarray
        if self.op == "product":
            kernel = of(self.kernel).reshape(-1, self.outputs)
            patches = windows(values[0], self.index, self.width).reshape(-1, len(kernel))
            return (patches @ kernel).reshape(*values[0].shape[:-1], self.size)
        total = values[0] if len(values) == 1 else values[0] + values[1]
        return total * of(self.factor) + (0.0 if absolute else self.constant)

    def backward(self, rows: Array) -> list[Array]:
        """Coefficients on the value of a linear op, pulled back to its operands."""
        if self.op != "product":
            return [rows * self.factor] * len(self.inputs)
        rows = windows(rows, np.arange(len(self.index) + (self.uses < 0).any()), self.outputs)
        product = rows.reshape(-1, self.outputs) @ self.kernel.reshape(-1, self.outputs).T
        product = product.reshape(*rows.shape[:-2], -1, self.width)
        total = sum((np.take(product, column, axis=-2) for column in self.uses.T), np.zeros(1))
        return [total.reshape(*rows.shape[:-2], -1)]

    def value(self, x: Array) -> Array:
        """The value of an elementwise op."""
        if self.op == "ramp":
            return np.where(x < self.low, self.low + self.slope * x, np.minimum(x, self.high))
        return 1.0 / (1.0 + np.exp(-x)) if self.op == "sigmoid" else getattr(np, self.op)(x)

    def around(self, low: Array, high: Array, slope: Any) -> tuple[Array, Array]:
        """Where in `[low, high]` `f(x) - slope x` may be extreme, and its lower and upper bounds.

        An error of such a point counts to second order only: slopes are 0 or at least `2^-42`.
        """
        points: list[Any] = [end for end in (self.low, self.high) if np.isfinite(end).any()]
        if self.op == "exp":
            points = [np.log(slope)]
        elif self.op != "ramp":  # sigmoid(x) = (1 + tanh(x / 2)) / 2
            scale = 1.0 if self.op == "tanh" else 0.5
            touching = np.arctanh(np.sqrt(np.clip(1.0 - slope / scale**2, 0.0, 1.0))) / scale
            points = [-touching, touching]
        x = np.stack([low, high, *(np.clip(point, low, high) for point in points)])
        image, line = self.value(x), slope * x
        error = 32 * UNIT * (np.abs(image) + np.abs(line) + (self.op != "ramp")) + TINY
        return x, np.stack((image - line - error, image - line + error))

    def slopes(self, low: Array, high: Array, rule: str, tie: Any) -> Array:
        """Slopes of a line below and of a line above, any of which are sound."""
        at_low, at_high = self.value(low), self.value(high)
        if self.op != "ramp":  # those of the lines that are closest at the middle
            steepest: Any = {"tanh": 1.0, "sigmoid": 0.25}.get(self.op, at_high)
            least, most = np.zeros((2, *low.shape)), np.zeros((2, *low.shape)) + steepest
            for _ in range(48):
                slope = 0.5 * (least + most)
                sides = [self.around(low, high, slope[k]) for k in (0, 1)]
                places = [(x, ((-1) ** k * y[k]).argmin(axis=0)) for k, (x, y) in enumerate(sides)]
                at = [np.take_along_axis(x, place[None], 0) for x, place in places]
                steeper = (np.concatenate(at) < 0.5 * (low + high)) == [[[True]], [[False]]]
                least, most = np.where(steeper, slope, least), np.where(steeper, most, slope)
            return np.where(least < 2.0**-40 * steepest, 0.0, least)
        # A line turns about a kink inside of the interval; how far the ends are from both kinks:
        start = np.stack((low - self.low, self.high - high))
        end = np.stack((high - self.low, self.high - low))
        bent, chord = (start < 0) & (end > 0), (at_high - at_low) / (high - low)
        least = np.stack(np.broadcast_arrays(self.slope, 0.0))[:, None]
        rise = np.stack((at_high - self.low, self.high - at_low)) / end - least
        adaptive = end > -(1.0 + np.resize(tie, self.size)) * start
        share = {"parallel": end / (end - start), "shares": tie}.get(rule, adaptive)
        exact = np.where(high <= self.low, self.slope, np.where(low >= self.high, 0.0, 1.0))
        return np.where(bent.any(axis=0), np.where(bent, least + rise * share, chord), exact)


def windows(x: Array, index: Array, width: int = 1) -> Array:
    """`[..., sites * width] -> [..., *index.shape, width]`; 0 where the index is -1."""
    sites = x.reshape(*x.shape[:-1], -1, width)
    sites = np.concatenate([sites, np.zeros_like(sites[..., :1, :])], axis=-2)
    return np.take(sites, index, axis=-2)


def append(nodes: list[Node], op: str, inputs: Sequence[int], **arrays: Any) -> int:
    """Appends a node whose operands come before it; returns its index."""
    k = len(nodes)
    fits = all(type(i) is int and 0 <= i < k for i in inputs) and (op == "input") == (k == 0)
    require(fits and k < MAX_NODES, f"node {k}: its operands must come before it, the input first")
    nodes.append(Node(op, inputs, [nodes[i].size for i in inputs], arrays))
    return k


def read_weights(path: str | os.PathLike[str]) -> tuple[list[Node], list[str]]:
    """The nodes of an exported network, the last of which has the logits, and what it is."""
    arrays, nodes = read_arrays(path), list[Node]()
    network = ["weights", digest(arrays)]
    for k, (op, *inputs) in enumerate(description(arrays, "boundjax-weights", {"nodes"})["nodes"]):
        names = [name for name in arrays if name.startswith(f"{k}.")]
        append(nodes, op, inputs, **{name.partition(".")[2]: arrays.pop(name) for name in names})
    require(nodes and not arrays, f"unknown entries: {', '.join(arrays)}")
    return nodes, network


def gamma(terms: int, unit: float = UNIT) -> float:
    """The error of a sum of products by the sum of their absolute values (Higham 2002, 3.1)."""
    share = (terms + 4) * unit  # in any order; four more pay for what compilers rewrite
    return 0.0 if not terms else share / (1.0 - share) if share < 0.25 else math.inf


def dot(rows: Array, vector: Array) -> Array:
    """`[N, R, size]` and `[N, size]` -> `[N, R]`."""
    return (rows @ vector[..., None])[..., 0]


class Bounds:
    """Intervals of all nodes for a batch of examples, and rows that are pulled back to the inputs.

    A step back may lose `<|row|, charge>`, by rounding here and in programs of a `unit` (0: none).
    `chains` are sums in any order: the terms, their absolute sum, and the error before them.
    """

    def __init__(self, nodes: list[Node], sets: Any, word: str, unit: float, tie: Any) -> None:
        self.nodes, self.sets, self.unit, self.tie = nodes, sets, unit, tie
        self.rule, linear, self.intersects = WITNESSES[word]
        self.normal, self.limit = (2.0**-126, 2.0**127) if unit > UNIT else (TINY, 2.0**1023)
        self.users = np.bincount([i for node in nodes for i in node.inputs], minlength=len(nodes))
        bent = {i: node for node in nodes if node.op not in LINEAR for i in node.inputs}
        zero, first, self.reach = np.zeros_like(sets[2]), list[bool](), list[Array]()
        tables: list[list[Any]] = [[sets[2]], [sets[3]], [zero], [zero], [()], [()]]
        self.low, self.high, self.charge, self.errors, self.lines, self.chains = tables
        for k, node in enumerate(nodes):
            if k:
                values = self.linear(node) if node.op in LINEAR else self.nonlinear(node)
                for table, value in zip(tables, values, strict=True):
                    table.append(value)
            first.append(not k or (node.op in LINEAR and all(first[i] for i in node.inputs)))
            ball = k in bent and first[k] and sets[4] < math.inf  # tighter than its box
            if ball or (linear and k in bent):
                self.refine(k, bent[k], ball)
            self.reach.append(np.maximum(np.abs(self.low[k]), np.abs(self.high[k])))
            if node.op not in LINEAR:
                self.chains[k] = 0, self.reach[k], self.errors[k]

    def linear(self, node: Node) -> tuple[Any, ...]:
        """The entries of a linear op in the tables: its interval by middle and radius."""
        ends = [(self.low[i], self.high[i]) for i in node.inputs]
        middles = [0.5 * (low + high) for low, high in ends]
        radii = [np.maximum(m - e[0], e[1] - m) for e, m in zip(ends, middles, strict=True)]
        size = node.forward([self.reach[i] for i in node.inputs], absolute=True)
        most = sum(self.reach[i].max(axis=1, keepdims=True) for i in node.inputs)
        flush = (node.terms + 2) * (most + node.largest + 2.0)  # in least normal numbers
        constant = np.abs(node.constant)
        charge = 4 * gamma(node.overlap) * size + 4 * gamma(node.size) * constant
        rounding = 4 * gamma(node.terms) * (size + constant) + TINY * flush
        total, local, chain = np.zeros((1, node.size)), 0.0, ()
        if self.unit:  # a program's value may differ from that of its operands there by `local`
            terms, before, carried = node.terms, 0.0, self.normal * flush + np.zeros_like(size)
            errors = [self.errors[i] for i in node.inputs]
            if node.op != "product" or not terms:  # the chain goes on
                chains = [self.chains[i] for i in node.inputs]
                terms += sum(chain[0] for chain in chains)
                size, more = (node.forward([c[k] for c in chains], absolute=True) for k in (1, 2))
                carried, before = carried + more, node.forward(errors, absolute=True)
            chain = terms, size + constant, carried
            total = carried + 1.001 * gamma(terms, self.unit) * chain[1]
            total = np.where(chain[1] < self.limit, total, np.inf)
            # A value with several users may be computed, and rounded, anew for each of them.
            anew = [2.0 * self.errors[i] * (self.users[i] > 1) for i in node.inputs]
            local = np.maximum(total - before, 1e-9 * total) + node.forward(anew, absolute=True)
        radius = (node.forward(radii, absolute=True) + rounding + local) * (1.0 + 2.0**-48)
        middle = node.forward(middles)
        low, high = np.nextafter(middle - radius, -np.inf), np.nextafter(middle + radius, np.inf)
        return low, high, charge + local, total, (), chain

    def nonlinear(self, node: Node) -> tuple[Any, ...]:
        """The entries of an elementwise op or a maximum in the tables."""
        (i,) = node.inputs
        low, high, reach, error = (a[i] for a in (self.low, self.high, self.reach, self.errors))
        if node.op == "max":
            parts = (windows(a, node.index)[..., 0] for a in (reach, error, low, high))
            reach, error, low, high = parts
            low, high = (np.where(node.index < 0, -np.inf, a) for a in (low, high))
            reach, error, least, most = (a.max(axis=-1) for a in (reach, error, low, high))
            first, top = (np.arange(node.taps) == a.argmax(axis=-1)[..., None] for a in (low, high))
            start = np.where(top, low, -np.inf).max(axis=-1)
            rest = np.where(top, -np.inf, high).max(axis=-1)
            # The other elements are at most `rest`, and max(x_top, rest) lies below its chord.
            chord = np.clip((most - rest) / (most - start), 0.0, 1.0)
            above = np.maximum(rest - chord * start, most - chord * most) + 8 * UNIT * reach + TINY
            chord, above = (np.where(start >= rest, *p) for p in ((1.0, chord), (0.0, above)))
            lines, steep, curve, ulps = (first, top * chord[..., None], 0 * above, above), 1, 1, 0
        else:
            bounds = node.around(low, high, 0.0)[1]
            least, most, slopes = bounds[0].min(axis=0), bounds[1].max(axis=0), 0.0 * bounds[:, 0]
            if self.rule != "none":
                slopes = node.slopes(low, high, self.rule, self.tie)
                bounds = [node.around(low, high, slopes[k])[1][k] for k in (0, 1)]
            lines = (*slopes[..., None], bounds[0].min(axis=0), bounds[1].max(axis=0))
            steep, ulps = np.abs(slopes).max(axis=0), 1 if node.op == "ramp" else 4
            curve = most if node.op == "exp" else np.maximum(1.0, np.abs(node.slope))
        size, error = np.maximum(np.abs(least), np.abs(most)), 1.001 * curve * error
        local = np.where(size < self.limit, 2 * ulps * self.unit * size + self.normal, np.inf)
        local = local if self.unit else 0.0 * size  # an ulp is at most two units
        total, local = local + error, local + 2.0 * error * (self.users[i] > 1)
        offsets = 4 * gamma(node.size) * np.maximum(np.abs(lines[2]), np.abs(lines[3]))
        charge = 4 * gamma(node.overlap + 1) * steep * reach + offsets + local
        low, high = np.nextafter(least - local, -np.inf), np.nextafter(most + local, np.inf)
        return low, high, charge, total, lines, ()

    def refine(self, k: int, user: Node, every: bool) -> None:
        """Cuts a node's interval with linear bounds, or replaces it, in blocks of its units."""
        low, high, units = self.low[k], self.high[k], np.arange(self.nodes[k].size)
        if user.op == "ramp" and self.intersects and not every:  # only where lines differ
            units = units[np.ptp(user.slopes(low, high, self.rule, self.tie), axis=0).any(axis=0)]
        step = max(1, BLOCK // (len(low) * max(node.work for node in self.nodes[: k + 1])))
        for part in (units[start : start + step] for start in range(0, len(units), step)):
            rows = 1.0 * (np.arange(low.shape[1]) == part[:, None])[None]
            below, above = self.bound(k, rows), -self.bound(k, -rows)
            if self.intersects or user.op == "max":
                below, above = np.maximum(below, low[:, part]), np.minimum(above, high[:, part])
            low[:, part], high[:, part] = below, above

    def bound(self, k: int, rows: Array, flat: bool = False, starts: Any = ()) -> Array:
        """Lower bounds `[N, R]` on `<rows, value of k>`; `flat`: by intervals; adds `starts`."""
        pending, constant, loss = {**dict(starts), k: rows}, np.zeros(1), np.full(1, 2.0**-990)
        for j in (j for j in range(k, 0, -1) if j in pending):
            node, rows, charge = self.nodes[j], pending.pop(j), self.charge[j]
            operands, ends = list[Array](), [self.low[j], self.high[j]]
            if node.op in LINEAR:
                operands, loss = node.backward(rows), loss + dot(np.abs(rows), charge)
                constant = constant + (rows @ node.constant if node.constant.any() else 0.0)
            else:
                parts = np.maximum(rows, 0.0), np.minimum(rows, 0.0)
                charge = 4 * gamma(node.size) * self.reach[j] if flat else charge
                if not flat:
                    first, second, *ends = self.lines[j]
                    new = parts[0][..., None] * first[:, None]
                    new += parts[1][..., None] * second[:, None]
                    new = new.reshape(*new.shape[:2], -1)
                    operands = [windows(new, node.uses).sum((-2, -1)) if node.op == "max" else new]
                constant = constant + dot(parts[0], ends[0]) + dot(parts[1], ends[1])
                loss = loss + dot(parts[0] - parts[1], charge)
            loss = loss + 4 * UNIT * np.abs(constant)
            for i, operand in zip(node.inputs, operands, strict=False):
                total = pending[i] = operand + pending[i] if i in pending else operand
                if self.users[i] > 1 or starts:
                    loss = loss + 4 * UNIT * dot(np.abs(total), self.reach[i])
                loss = loss + 2.0**-990 * self.reach[i].sum(axis=1)[:, None]  # what underflows
        least = self.least(pending[0]) if 0 in pending else 0.0
        loss = (1.0 + 1e-6) * loss + 8 * UNIT * (np.abs(constant) + np.abs(least))
        return constant + least - loss

    def least(self, rows: Array) -> Array:
        """Lower bounds `[N, R]` on `<rows, x>`: the larger of those over box and ball."""
        x, eps, low, high, norm = self.sets
        size, middle, error = np.abs(rows), 0.5 * (low + high), 4 * gamma(x.shape[1])
        radius = np.maximum(high - middle, middle - low)
        box = dot(rows, middle) - dot(size, radius + error * (np.abs(middle) + radius))
        if norm == math.inf:
            return box
        scaled = -rows * eps[:, None]
        spread = np.abs(scaled).max(axis=-1)
        if norm == 2:  # the dual of ball and box: every multiplier gives an upper bound
            ends = [((end - x) / np.where(eps > 0, eps, 1.0))[:, None] for end in (low, high)]
            point, multiplier = scaled, np.ones((*spread.shape, 1))
            for _ in range(30):
                multiplier = multiplier * np.linalg.norm(point, axis=-1, keepdims=True) + TINY
                point = np.clip(scaled / multiplier, *ends)
            terms, squares = scaled * point, 0.5 * multiplier * point**2
            spread = (terms - squares).sum(axis=-1) + 0.5 * multiplier[..., 0] * (1.0 + error)
            spread = spread + 2.0 * error * (np.abs(terms) + squares).sum(axis=-1)
        return np.fmax(box, dot(rows, x) - spread * (1.0 + error) - error * dot(size, np.abs(x)))


def check(options: argparse.Namespace) -> int:
    """Checks a certificate and prints what is proved; returns the exit status."""
    claims, arrays = read_certificate(options.file)
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    onnx = options.onnx and __import__("check_onnx").read_onnx(options.onnx, append)
    nodes, network = onnx or read_weights(options.weights)
    require(claims["network"] == network, "it is about another network")
    x = arrays["x"] if "x" in arrays else read_arrays(options.data)["x"]
    require(digest({"x": x}) == claims["inputs"], "it is about other inputs")
    labels, verified, margins = (arrays[name] for name in ("labels", "verified", "margins"))
    count, outputs, last, lines = len(x), nodes[-1].size, len(nodes) - 1, list[str]()
    fits = x.dtype.kind == "f" and np.isfinite(x).all() and x[0].size == nodes[0].size
    fits = fits and labels.shape == verified.shape == (count,) and labels.max() < outputs > 1
    require(fits and margins.shape in ((count, 0), (count, outputs)), "claims of other shapes")
    unit = {4: 2.0**-24, 8: UNIT}[x.itemsize] * (claims["arithmetic"] == "float32")
    sets, words, logits, lost = sets_of(arrays, x), claims["witness"], np.eye(outputs), 0.0
    norm = math.inf if claims["norm"] == "inf" else claims["norm"]
    one_by_one = norm < math.inf or any(WITNESSES[word][1] for word in words)
    work = BLOCK if one_by_one else outputs * max(node.work for node in nodes)
    sample = np.random.default_rng(options.seed).permutation(count)[: max(options.sample, 1)]
    claim = np.sort(sample[(verified | (margins > -np.inf).any(axis=1))[sample]])
    for part in np.array_split(claim, max(1, -(-len(claim) * work // BLOCK))):
        proved, bounds = logits[labels[part]] > 0, np.full((2, len(part), outputs), -np.inf)
        claimed = margins[part] if margins.size else np.full_like(bounds[0], -np.inf)
        slack, least = np.zeros((len(part), 1)), bounds[int(unit > 0)]  # real numbers, programs
        for tie in TIES:  # rounding may decide on which side of a tie a slope falls
            left = np.flatnonzero(~proved.all(axis=1))
            rows = logits[labels[part[left]]][:, None] - logits
            for word, k in itertools.product(words * bool(left.size), (0, 1) if unit else (0,)):
                walk = Bounds(nodes, (*(a[part[left]] for a in sets), norm), word, k * unit, tie)
                for flat in (True, False)[: 1 + (word != "interval")]:
                    bounds[k, left] = np.fmax(bounds[k, left], walk.bound(last, rows, flat))
                slack[left] = TOLERANCE * walk.reach[-1].max(axis=1, keepdims=True)
            reached = (bounds[0] + slack >= claimed) | (claimed == -np.inf)
            proved |= reached & ((least > 0) | ~verified[part][:, None])
        lost = np.fmax.reduce(bounds[0] - least, axis=None, initial=lost)
        for n, m in zip(*np.nonzero(~proved), strict=True):
            text = "verified, " * int(verified[part[n]]) + f"margin {claimed[n, m]:.6g}"
            lines.append(f"example {part[n]}, class {m}: {text}; proved is {least[n, m]:.6g}")
    of = f"programs with unit {unit:.3g} and functions within 4 ulp" if unit else "real numbers"
    print(f"for {of}; computed in float64 with plain sums and functions within 8 ulp", *lines,
          f"{len(sample)} of {count} examples checked (seed {options.seed}), "
          f"{verified[sample].sum()} claimed robust: {len(lines)} margins not proved; "
          f"programs lose at most {lost:.3g}", sep="\n")  # fmt: skip
    return 1 if lines else 0


def sets_of(arrays: Mapping[str, Array], x: Array) -> tuple[Array, ...]:
    """The input sets: inputs, radii per feature, and ends of the boxes; all `[B, size]`."""
    eps = arrays["eps"]
    eps = eps.reshape(-1, *[1] * (x.ndim - 1)) if eps.ndim == 1 else eps
    ends = arrays.get("clip_low", np.float64(-np.inf)), arrays.get("clip_high", np.float64(np.inf))
    whole = (np.broadcast_to(np.asarray(a, np.float64), x.shape) for a in (x, eps, *ends))
    x, eps, low, high = (a.reshape(len(x), -1) for a in whole)
    require(((low <= x) & (x <= high)).all(), "the inputs must lie in the clip range")
    ends = [np.where(eps > 0, np.nextafter(x + s * eps, s * np.inf), x) for s in (-1, 1)]
    return x, eps, np.maximum(ends[0], low), np.minimum(ends[1], high)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m boundjax.check`; returns the exit status."""
    parser = argparse.ArgumentParser("boundjax.check", description="Proves a certificate again.")
    parser.add_argument("file", help="the certificate")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--weights", help="the network, by boundjax.export_weights")
    network.add_argument("--onnx", help="the network, an ONNX file")
    parser.add_argument("--data", default="--data", help="`x`, if the certificate lacks it")
    parser.add_argument("--sample", type=int, default=MAX_SIZE, help="check so many, at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    options = parser.parse_args(arguments)
    try:
        with np.errstate(all="ignore"):
            return check(options)
    except Exception as error:  # whatever an untrusted file may provoke
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        print(f"cannot check {options.file}: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
