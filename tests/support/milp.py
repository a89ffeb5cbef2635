"""The exact minimum of a linear function of a small ReLU network, by mixed-integer programming."""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def exact_minimum(
    layers: list[tuple[np.ndarray, np.ndarray]],
    lower: np.ndarray,
    upper: np.ndarray,
    row: np.ndarray,
    binary: bool = True,
) -> float:
    """`min <row, f(x)>` over `lower <= x <= upper` for `f = affine, relu, ..., affine`.

    Tjeng et al. 2019: one binary per unstable ReLU, big-M constants from interval bounds. Solved by
    SciPy's HiGHS. With `binary=False` the binaries are relaxed: the linear program that no
    relaxation of single ReLUs with these pre-activation bounds can beat.
    """
    width = len(lower)
    columns = width + sum(2 * len(bias) for _, bias in layers[:-1])  # z and its indicator
    low, high = np.full(columns, -np.inf), np.full(columns, np.inf)
    low[:width], high[:width] = lower, upper
    integral = np.zeros(columns)
    rows, least, most = [], [], []

    def constrain(entries, at_least, at_most):
        coefficients = np.zeros(columns)
        for index, value in entries:
            coefficients[index] += value
        rows.append(coefficients)
        least.append(at_least)
        most.append(at_most)

    before, ends, free = np.arange(width), (lower, upper), width
    for kernel, bias in layers[:-1]:
        centre, radius = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
        middle, spread = centre @ kernel + bias, radius @ np.abs(kernel)
        below, above = middle - spread, middle + spread
        count = len(bias)
        z, d = free + np.arange(count), free + count + np.arange(count)
        free += 2 * count
        low[z], high[z] = np.maximum(below, 0), np.maximum(above, 0)
        low[d], high[d] = 0, 1
        integral[d] = binary
        for j in range(count):
            affine = list(zip(before, kernel[:, j], strict=True))  # value - bias_j
            if below[j] >= 0:
                constrain([(z[j], 1.0), *((i, -w) for i, w in affine)], bias[j], bias[j])
            elif above[j] > 0:
                constrain([(z[j], 1.0), *((i, -w) for i, w in affine)], bias[j], np.inf)
                # z <= value - below (1 - d),  z <= above d
                constrain(
                    [(z[j], 1.0), *((i, -w) for i, w in affine), (d[j], -below[j])],
                    -np.inf,
                    bias[j] - below[j],
                )
                constrain([(z[j], 1.0), (d[j], -above[j])], -np.inf, 0.0)
        before, ends = z, (np.maximum(below, 0), np.maximum(above, 0))
    kernel, bias = layers[-1]
    cost = np.zeros(columns)
    cost[before] = kernel @ row
    result = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), least, most) if rows else None,
        bounds=Bounds(low, high),
        integrality=integral,
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, result.message
    return result.fun + bias @ row
