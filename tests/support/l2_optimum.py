"""The exact minimum of linear functions of a small ReLU network over an l2 ball, cut by a box."""

import itertools
from collections.abc import Iterator

import numpy as np

Layers = list[tuple[np.ndarray, np.ndarray]]

# By how much a point may leave the ball or a half-space, in radii of at least 1.
_TOLERANCE = 1e-10


def forward(layers: Layers, points: np.ndarray) -> np.ndarray:
    """`f(x)` for `f = affine, relu, ..., affine` and points `[..., d]`, in NumPy."""
    for kernel, bias in layers[:-1]:
        points = np.maximum(points @ kernel + bias, 0.0)
    return points @ layers[-1][0] + layers[-1][1]


def sphere(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Unit vectors `[count, size]`, of all directions alike."""
    rays = rng.normal(size=(count, size))
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


# ------------------------------------------------------------------ the exact optimum


def exact_minima(
    layers: Layers,
    center: np.ndarray,
    eps: float,
    rows: np.ndarray,
    clip: tuple[float, float] | None = None,
) -> np.ndarray:
    """`min <row, f(x)>` over `||x - center||_2 <= eps`, `clip[0] <= x <= clip[1]`, for every row.

    Branches over the activation patterns. On a pattern the network is affine and the region is the
    ball cut by half-spaces, where a linear function is least at one of finitely many points: for
    some set of linearly independent half-spaces that bind, at the point of the ball's slice through
    their borders that is furthest against the function's slope. All of them are tried; those in
    the region are values that the network attains, so the result cannot be too small.
    """
    # Where a row is constant on a face of the region, a generic direction finds a point of it.
    generic = np.random.default_rng(0).normal(size=len(center))
    best = np.full(len(rows), np.inf)
    for (slope, _), normals, offsets in _patterns(layers, center, eps):
        if clip is not None:
            axes = np.eye(len(center))
            normals = np.concatenate([normals, axes, -axes])
            ends = np.full(len(center), clip[1]), np.full(len(center), -clip[0])
            offsets = np.concatenate([offsets, *ends])
        # Half-spaces that hold the ball never bind.
        cuts = offsets - normals @ center <= eps * np.linalg.norm(normals, axis=1)
        directions = np.concatenate([rows @ slope.T, generic[None]])
        points = _candidates(normals[cuts], offsets[cuts], center, eps, directions)
        if len(points):
            best = np.minimum(best, (forward(layers, points) @ rows.T).min(0))
    assert np.isfinite(best).all(), "no activation pattern meets the ball"
    return best


def _patterns(layers: Layers, center: np.ndarray, eps: float) -> Iterator[tuple]:
    """`(slope, constant)` of the output and half-spaces `normals @ x <= offsets`, per pattern.

    Patterns with a unit whose half-space does not meet the ball are left out.
    """
    width = len(center)

    def descend(k: int, slope, constant, normals, offsets):
        kernel, bias = layers[k]
        slope, constant = slope @ kernel, constant @ kernel + bias
        if k == len(layers) - 1:
            yield (slope, constant), np.array(normals).reshape(-1, width), np.array(offsets)
            return
        middle, reach = center @ slope + constant, eps * np.linalg.norm(slope, axis=0)
        # A unit that is constant 0 is off.
        choices = [
            (1,) if low >= 0 and high > 0 else (0,) if high <= 0 else (0, 1)
            for low, high in zip(middle - reach, middle + reach, strict=True)
        ]
        for active in itertools.product(*choices):
            on = np.array(active)
            split = [j for j, choice in enumerate(choices) if len(choice) == 2]
            signs = 1 - 2 * on  # active: -(slope x + constant) <= 0
            more = [signs[j] * slope[:, j] for j in split]
            ends = [-signs[j] * constant[j] for j in split]
            yield from descend(k + 1, slope * on, constant * on, normals + more, offsets + ends)

    yield from descend(0, np.eye(width), np.zeros(width), [], [])


def _candidates(
    normals: np.ndarray,
    offsets: np.ndarray,
    center: np.ndarray,
    eps: float,
    directions: np.ndarray,
) -> np.ndarray:
    """Where linear functions may be least on the ball cut by half-spaces: points `[n, d]` of it."""
    result, width = [], len(center)
    for size in range(min(width, len(offsets)) + 1):
        subsets = np.array(list(itertools.combinations(range(len(offsets)), size)), int)
        borders = normals[subsets]  # [K, size, d]
        inverses = np.linalg.pinv(borders)
        missing = offsets[subsets] - borders @ center
        shift = (inverses @ missing[..., None])[..., 0]
        squared = eps**2 - (shift**2).sum(-1)  # of the radius that is left in the slice
        radius = np.sqrt(np.maximum(squared, 0.0))
        along = directions - np.swapaxes(inverses @ (borders @ directions.T), 1, 2)
        length = np.linalg.norm(along, axis=-1, keepdims=True)
        slips = (size < width) & (length > 1e-12)
        unit = np.where(slips, along / np.where(slips, length, 1.0), 0.0)
        result.append((center + shift[:, None] - radius[:, None, None] * unit).reshape(-1, width))
    points = np.concatenate(result)
    slack = _TOLERANCE * max(eps, 1.0)
    inside = np.linalg.norm(points - center, axis=1) <= eps + slack
    return points[inside & (points @ normals.T <= offsets + slack).all(1)]
