"""The public verification suites beside the checkout: tables, networks, properties, bounds."""

import csv
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import boundjax as bj
from boundjax import slopes, verify, vnnlib
from boundjax.certification.presets import METHODS
from boundjax.sets import Interval
from boundjax.tracing.trace import trace
from boundjax.transforms import problem as problems
from boundjax.transforms.walk import Walk

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "suites" / "public"

# The reference's name of a method and ours.
PRESETS = {"IBP": "interval", "CROWN-IBP": "crown-ibp", "CROWN": "crown"}

# The reference's intervals fold the specification into the last layer, ours into all affine ones
# at the end. Its graphs of these have no layer to fold into: there it bounds the outputs.
NOT_MERGED = {"marabou_cifar10", "sri_resnet_a", "cifar_biasfield"}


def benchmarks(file: str) -> list[str]:
    """The benchmarks that have a file of this name."""
    return sorted(path.parent.name for path in PUBLIC.glob(f"*/{file}"))


@functools.cache
def table(benchmark: str, file: str) -> list[dict[str, str]]:
    with (PUBLIC / benchmark / file).open(newline="") as opened:
        return list(csv.DictReader(opened))


def bounded(benchmark: str) -> list[dict[str, str]]:
    """The reference's rows of the methods that are not an optimiser's."""
    return [row for row in table(benchmark, "ref_bounds.csv") if row["method"] in PRESETS]


def instance(benchmark: str, name: str) -> dict[str, str]:
    """The row of a property file."""
    rows = table(benchmark, "instances.csv")
    return next(row for row in rows if row["vnnlib"] == f"{name}.vnnlib.gz")


def numbers(text: str) -> np.ndarray:
    return np.array(text.split(), np.float64)


@functools.lru_cache(maxsize=4)
def model(benchmark: str, onnx: str):
    return bj.from_onnx(PUBLIC / benchmark / onnx)


@functools.lru_cache(maxsize=4)
def programs(benchmark: str, onnx: str) -> verify.Programs:
    result = model(benchmark, onnx)
    return verify.Programs(result.single, result.input_shape)


@functools.lru_cache(maxsize=8)
def asked(benchmark: str, file: str) -> vnnlib.Property:
    return vnnlib.load(PUBLIC / benchmark / file)


def unsafe(property: vnnlib.Property, x: np.ndarray, y: np.ndarray, slack: float) -> bool:
    """Whether ``x`` lies in a box (to 1e-6, as stored) and ``y`` is unsafe for it.

    ``slack`` is what rounding may add to a row, relative to its terms.
    """
    y = y.astype(np.float64)

    def holds(conjunction):
        weights, offset = conjunction.weights, conjunction.offset
        terms = np.abs(weights) @ np.abs(y) + np.abs(offset)
        return (weights @ y + offset <= slack * terms).all()

    return any(
        ((case.lower - 1e-6 <= x) & (x <= case.upper + 1e-6)).all()
        and any(map(holds, case.conjunctions))
        for case in property.cases
    )


def refutes(property: vnnlib.Property, lower: np.ndarray) -> bool:
    """Whether every conjunction has a row whose lower bound is positive; rows in file order."""
    counts = [len(c.offset) for case in property.cases for c in case.conjunctions]
    return all((part > 0).any() for part in np.split(lower, np.cumsum(counts)[:-1]))


# --- bounds as the reference computes them -----------------------------------------------------


class ReferenceWalk(Walk):
    """CROWN as auto_LiRPA walks it.

    An intermediate bound is the linear one alone, not intersected with the interval. Where at most
    nine tenths of a layer are unstable by their intervals, only those units are walked, and the
    others keep the interval.
    """

    def node_bounds(self, node, sides, optimize_rows=False, intersect=True, wanted=None):
        known = self.intervals[node.index]
        bounds = super().node_bounds(node, sides, optimize_rows, intersect=False)
        stable = (known.lower >= 0) | (known.upper <= 0)
        kept = stable & (jnp.mean(~stable, dtype=known.lower.dtype) <= 0.9)
        ends = zip(known, bounds, strict=True)
        return Interval(*(jnp.where(kept, interval, walked) for interval, walked in ends))


def _linear(function, refine):
    """Not intersected with interval bounds at the end, unlike ``bj.linear``."""

    def lower(box, rows):
        traced = trace(function, box.lower)
        walk = ReferenceWalk(traced, box, slopes.resolve("adaptive"), refine=refine)
        starts, constant = problems.starts_of(traced, rows)
        return walk.pull_back(starts, "lower").concretize(box)[0] + constant

    return lower


def _merged(function):
    return lambda box, rows: bj.interval(function)(box, rows).lower


def _not_merged(function):
    def lower(box, rows):
        outputs = bj.interval(function)(box)
        return jnp.maximum(rows, 0.0) @ outputs.lower + jnp.minimum(rows, 0.0) @ outputs.upper

    return lower


def _as_reference(method: str, merged: bool):
    if method == "IBP":
        return _merged if merged else _not_merged
    return functools.partial(_linear, refine=method == "CROWN")


def _as_preset(method: str):
    transform = METHODS[PRESETS[method]]
    return lambda function: lambda box, rows: transform(function, 2**30)(box, rows).lower


@functools.lru_cache(maxsize=6)
def _compiled(benchmark: str, onnx: str, method: str, preset: bool):
    network = model(benchmark, onnx)

    def flat(x):
        return jnp.reshape(network.single(jnp.reshape(x, network.input_shape)), (-1,))

    make = _as_preset(method) if preset else _as_reference(method, benchmark not in NOT_MERGED)
    bounds = make(flat)
    return jax.jit(lambda lower, upper, rows: bounds(bj.Box(lower, upper), rows))


def lower_bounds(benchmark: str, row: dict[str, str], preset: bool) -> np.ndarray:
    """Of ``A y - b`` for every row of the property, in file order."""
    function = _compiled(benchmark, row["onnx"], row["method"], preset)
    result = []
    for case in asked(benchmark, row["vnnlib"]).cases:
        weights = np.concatenate([c.weights for c in case.conjunctions])
        offset = np.concatenate([c.offset for c in case.conjunctions])
        rows = jnp.asarray(weights.astype(np.float32))
        result.append(np.asarray(function(case.lower, case.upper, rows)) + offset)
    return np.concatenate(result)


def tolerance(reference: np.ndarray) -> np.ndarray:
    """rtol 1e-3, and the float32 rounding of terms that cancel in a bound.

    Those are of the size of the outputs: ten, or the largest bound of the property.
    """
    return 1e-3 * np.abs(reference) + 1e-6 * max(10.0, np.abs(reference).max())
