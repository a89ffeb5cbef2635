"""Tiny networks for the certificate checker, evaluated in rationals and by float32 programs."""

from fractions import Fraction

import numpy as np

from boundjax import check


def dense(nodes, place, matrix, bias=None):
    """A dense layer `[in, out]`; its bias is a node of its own, as in exported networks."""
    matrix = np.asarray(matrix)
    index = np.arange(nodes[place].size // len(matrix), dtype=np.int32)[:, None]
    place = check.append(nodes, "product", (place,), index=index, kernel=matrix[None])
    return place if bias is None else affine(nodes, place, constant=bias)


def affine(nodes, place, factor=1.0, divisor=1.0, constant=0.0):
    values = {"factor": factor, "divisor": divisor, "constant": constant}
    arrays = {name: np.array(value, np.float32, ndmin=1) for name, value in values.items()}
    result = check.append(nodes, "affine", (place,), **arrays)
    nodes[result].raw = [np.broadcast_to(a, nodes[result].size) for a in arrays.values()]
    return result


def ramp(nodes, place, low=0.0, high=np.inf, slope=0.0):
    ends = {"low": low, "high": high, "slope": slope}
    arrays = {name: np.array(value, np.float32, ndmin=1) for name, value in ends.items()}
    return check.append(nodes, "ramp", (place,), **arrays)


def start(size):
    nodes = []
    check.append(nodes, "input", (), size=np.array([size], np.int32))
    return nodes


def random_network(random, inputs=3):
    """Weights whose terms cancel, residual sums, maxima, BatchNorm-like factors; two outputs."""
    nodes = start(inputs)

    def matrix(rows, columns):
        value = random.normal(size=(rows, columns)) * 10.0 ** random.uniform(-2, 4)
        if random.random() < 0.6:
            value[-1] -= value.sum(axis=0)
        return value.astype(np.float32)

    def bias(size):
        return (random.normal(size=size) * 10.0 ** random.uniform(-3, 3)).astype(np.float32)

    width = 3
    place = dense(nodes, 0, matrix(inputs, width))
    if random.random() < 0.5:  # a product whose elements are moved, as by a transposition
        index = random.permutation(width).astype(np.int32)[:, None]
        kernel = np.ones((1, 1, 1), np.float32)
        place = check.append(nodes, "product", (place,), index=index, kernel=kernel)
    place = affine(nodes, place, constant=bias(width))
    for _ in range(random.integers(1, 3)):
        kind = random.integers(5)
        if kind == 0:
            hidden = ramp(nodes, place)
            hidden = dense(nodes, hidden, matrix(width, width), bias(width))
            place = check.append(nodes, "add", (place, hidden))
        elif kind == 1:
            index = random.integers(-1, width, size=(width, 2)).astype(np.int32)
            index[:, 0] = np.arange(width)
            place = check.append(nodes, "max", (place,), index=index)
        elif kind == 2:
            place = affine(
                nodes, place, bias(width), bias(width) + np.sign(bias(width)), bias(width)
            )
            place = ramp(nodes, place, slope=random.choice([0.01, -1.0, 1.5]))
        elif kind == 3:
            place = ramp(nodes, place, low=-0.5, high=random.choice([0.5, 1e4]))
        else:
            place = ramp(nodes, place)
        place = dense(nodes, place, matrix(width, width), bias(width))
    dense(nodes, ramp(nodes, place), matrix(width, 2), bias(2))
    return nodes


def _places(node):
    """The terms of every element of a product: lists of (element of the operand, weight)."""
    for sites in node.index:
        for output in range(node.outputs):
            yield [
                (site * node.width + c, node.kernel[tap, c, output])
                for tap, site in enumerate(sites)
                if site >= 0
                for c in range(node.width)
            ]


def exact(nodes, x):
    """The outputs in rationals, for piecewise linear ops."""
    return exact_values(nodes, x)[-1]


def exact_values(nodes, x):
    """The values of all nodes in rationals."""
    values = [[Fraction(float(v)) for v in x]]
    for node in nodes[1:]:
        operands = [values[i] for i in node.inputs]
        values.append(_exact(node, operands))
    return values


def _exact(node, operands):
    x = operands[0]
    if node.op == "product":
        return [sum(Fraction(float(w)) * x[i] for i, w in terms) for terms in _places(node)]
    if node.op == "add":
        return [a + b for a, b in zip(*operands, strict=True)]
    if node.op == "max":
        return [max(x[i] for i in row if i >= 0) for row in node.index]
    if node.op == "affine":
        return [
            v * Fraction(float(f)) / Fraction(float(d)) + Fraction(float(c))
            for v, f, d, c in zip(x, *node.raw, strict=True)
        ]
    assert node.op == "ramp", node.op
    result = []
    for v, low, high, slope in zip(x, node.low, node.high, node.slope, strict=True):
        if not np.isinf(low) and v < Fraction(float(low)):
            result.append(Fraction(float(low)) + Fraction(float(slope)) * v)
        else:
            result.append(v if np.isinf(high) else min(v, Fraction(float(high))))
    return result


def program(nodes, x, random):
    """The outputs of a float32 program: sums in a random order, which may start with the bias."""
    return program_values(nodes, x, random)[-1]


def program_values(nodes, x, random):
    """The values of all nodes of such a program; a product may have the bias already."""
    values, fused = [[np.float32(v) for v in x]], set()
    for k, node in enumerate(nodes[1:], 1):
        operands = [values[i] for i in node.inputs]
        if k in fused:
            values.append(operands[0])
        elif node.op == "product":
            first = np.zeros(node.size)
            following = nodes[k + 1] if k + 1 < len(nodes) else None
            is_bias = following is not None and following.op == "affine" and following.terms == 1
            if is_bias and following.inputs == (k,) and random.random() < 0.5:
                first = following.constant
                fused.add(k + 1)
            terms = zip(_places(node), first, strict=True)
            values.append([_sum(t, operands[0], b, random) for t, b in terms])
        else:
            values.append(_program(node, operands))
    return values


def _sum(terms, x, first, random):
    total = np.float32(first)
    for k in random.permutation(len(terms)):
        i, weight = terms[k]
        if random.random() < 0.5:  # a fused multiply-add rounds once
            total = np.float32(float(np.float64(weight) * np.float64(x[i])) + float(total))
        else:
            total = np.float32(total + np.float32(np.float32(weight) * x[i]))
    return total


def _program(node, operands):
    x = operands[0]
    if node.op == "add":
        return [np.float32(a + b) for a, b in zip(*operands, strict=True)]
    if node.op == "max":
        return [max(x[i] for i in row if i >= 0) for row in node.index]
    if node.op == "affine":
        return [
            np.float32(np.float32(np.float32(v * f) / d) + c)
            for v, f, d, c in zip(x, *node.raw, strict=True)
        ]
    low, high, slope = (np.float32(v) for v in (node.low, node.high, node.slope))
    return [
        np.float32(a + s * v) if v < a else min(v, b)
        for v, a, b, s in zip(x, low, high, slope, strict=True)
    ]


def in_order(terms):
    """The float32 sum of terms in this order."""
    total = np.float32(0.0)
    for term in terms:
        total = np.float32(total + np.float32(term))
    return total


def cancelling_terms(count):
    """Terms of one size that cancel to a small sum, whose order matters in float32."""
    terms = np.random.default_rng(0).normal(size=count) * 1e3
    terms[-1] -= terms.sum()
    return terms.astype(np.float32)
