"""Bounds of a small network of dense layers and ReLUs, in NumPy: nothing here asks boundjax."""

from typing import NamedTuple

import numpy as np

Layers = list[tuple[np.ndarray, np.ndarray]]  # [out, in] and [out]; a ReLU between any two


class Set(NamedTuple):
    """The box `center +- radius`, or for `norm` 2 a ball."""

    center: np.ndarray
    radius: np.ndarray
    norm: str = "inf"

    def least(self, rows):
        """The minima `[m]` of `rows @ x`, and where they are, `[m, d]`."""
        direction = np.sign(rows)
        if self.norm == "2":
            direction = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-300)
        points = self.center - self.radius * direction
        return np.sum(rows * points, axis=-1), points


def box(lower, upper):
    return Set((lower + upper) / 2, (upper - lower) / 2)


def values(layers, x):
    """What every layer returns, before its ReLU."""
    result = []
    for weight, bias in layers:
        result.append(x @ weight.T + bias)
        x = np.maximum(result[-1], 0)
    return result


def intervals(layers, around):
    """Interval bounds before each ReLU, and the box that the last layer sees."""
    result = []
    for weight, bias in layers[:-1]:
        lower, upper = around.least(weight)[0] + bias, -around.least(-weight)[0] + bias
        result.append((lower, upper))
        around = box(np.maximum(lower, 0), np.maximum(upper, 0))
    return result, around


def interval_margins(layers, rows, around):
    weight, bias = layers[-1]
    return intervals(layers, around)[1].least(rows @ weight)[0] + rows @ bias


def chord(lower, upper):
    """The slope `u / (u - l)` of the upper line: 1 of an active ReLU, 0 of a dead one."""
    return np.maximum(upper, 0) / (np.maximum(upper, 0) - np.minimum(lower, 0))


def backward(layers, rows, around, bounds, slopes):
    """Lower bounds of `rows @ f`: back through a line below and one above every ReLU (CROWN)."""
    met, constant = [], 0.0
    for number in reversed(range(len(layers))):
        weight, bias = layers[number]
        constant, rows = constant + rows @ bias, rows @ weight
        if number:
            met.insert(0, rows)
            lower, upper = bounds[number - 1]
            above = chord(lower, upper)
            below = np.where(lower >= 0, 1.0, np.where(upper <= 0, 0.0, slopes[number - 1]))
            constant = constant - np.minimum(rows, 0) @ (above * np.minimum(lower, 0))
            rows = np.maximum(rows, 0) * below + np.minimum(rows, 0) * above
    least, points = around.least(rows)
    return least + constant, points, met
