"""Constants that an ONNX file computes from its weights, against onnxruntime and exact values."""

import jax
import numpy as np
import pytest

import boundjax as bj
from boundjax.ir.node import NoProofError
from boundjax.tracing.trace import trace
from boundjax.transforms.errors import ErrorAnalysis

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as models  # noqa: E402
import onnxruntime  # noqa: E402
from onnx_models import network, node, scalar  # noqa: E402

X = np.float32([[1.0, 2.0, 3.0]])
# `1 - sqrt(1 - 1e-4)`, whose computed value is off in the fourth digit.
TINY = [
    node("Sub", "one decay", "rest"),
    node("Sqrt", "rest", "root"),
    node("Sub", "one root", "t"),
]
CONSTANTS = {"one": np.ones(3, np.float32), "decay": np.full(3, 1e-4, np.float32)}


def tiny():
    return 1.0 - np.sqrt(1.0 - np.float64(CONSTANTS["decay"]))


def normalized(x):
    factor = 1.0 / np.sqrt(tiny() + 1e-6 - np.float64(1e-6) + np.float64(np.float32(1e-6)))
    return x * factor


NETWORKS = {
    "factor": ([node("Mul", "x t")], {}, lambda x: x * tiny()),
    "shift": (
        [node("Mul", "x zero", "z"), node("Add", "z t")],
        {"zero": np.zeros(3, np.float32)},
        lambda x: 0.0 * x + tiny(),
    ),
    "moved": (
        [node("Neg", "t", "n"), node("Reshape", "n shape", "m"), node("MatMul", "x m")],
        {"shape": models.i64(3, 1)},
        lambda x: x @ -tiny()[:, None],
    ),
    "batch norm": (
        [node("BatchNormalization", "x one zero zero t", epsilon=1e-6)],
        {"zero": np.zeros(3, np.float32)},
        normalized,
    ),
    "limit": (
        [
            node("ReduceMax", "t", "m", keepdims=0),
            node("Sub", "x ten", "z"),
            node("Clip", "z m"),
        ],
        {"ten": scalar(10.0)},
        lambda x: np.full_like(x, tiny()[0]),
    ),
    "padding": (
        [
            node("ReduceMax", "t", "m", keepdims=0),
            node("Pad", "x pads m", "z"),
            node("Slice", "z starts ends axes"),
        ],
        {
            "pads": models.i64(0, 0, 0, 2),
            "starts": models.i64(3),
            "ends": models.i64(5),
            "axes": models.i64(1),
        },
        lambda x: np.full((1, 2), tiny()[0]),
    ),
}


def programs(path):
    """onnxruntime with and without its optimisations of the graph."""
    for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        yield lambda x, session=session: session.run(None, {"x": x})[0].astype(np.float64)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.sampled(3)
def test_bounds_hold_for_the_exact_formula_and_for_the_runtime(name, tmp_path, monkeypatch):
    nodes, constants, exact = NETWORKS[name]
    path = models.save(network([*TINY, *nodes], [1, 3], CONSTANTS | constants), tmp_path)
    model = bj.from_onnx(path)
    value = exact(X.astype(np.float64))

    def bounds(rounding):
        within = jax.jit(lambda x: bj.linear(model.single, rounding=rounding)(bj.Box(x, x)))
        return [np.asarray(end, np.float64) for end in within(X[0])]

    def holds(ends, values):
        least = 1e-13 * np.abs(values)
        return (ends[0] <= values + least).all() and (values - least <= ends[1]).all()

    certain = bounds("float32")
    assert holds(bounds("real"), value)
    assert holds(certain, value)
    assert (certain[1] - certain[0] < 0.4 * np.abs(value)).all()
    for program in programs(path):
        computed = program(X)
        assert holds(certain, computed)
        assert not np.allclose(computed, value, rtol=2e-6, atol=0.0)
    nothing = lambda self, node, position: 0.0 * node.constant(position)  # noqa: E731
    monkeypatch.setattr(ErrorAnalysis, "_of_constant", nothing)
    assert not holds(bounds("real"), value)


def test_a_computed_slope_has_no_rounded_bounds(tmp_path):
    nodes = [*TINY, node("Neg", "x", "n"), node("PRelu", "n t")]
    model = bj.from_onnx(models.save(network(nodes, [1, 3], CONSTANTS), tmp_path))
    with pytest.raises(NoProofError, match="what a rounded constant changes in 'hinge'"):
        bj.linear(model.single, rounding="float32")(bj.Box(X[0], X[0]))


W = np.float32([1.1, 2.2, 3.3])
# Constants that are computed from weights alone, with a rounding on the way.
ROUNDS = {
    "BatchNormalization": ([node("BatchNormalization", "x w w w w", epsilon=1e-6)], ["add"]),
    "Reciprocal": ([node("Reciprocal", "w", "c"), node("Mul", "x c")], ["integer_pow"]),
    "HardSigmoid": ([node("HardSigmoid", "w", "c"), node("Mul", "x c")], ["mul", "add"]),
    "Range": ([node("Range", "a b a", "c"), node("Mul", "x c")], ["mul", "add"]),
    "Resize": (
        [node("Unsqueeze", "x axes", "u"), node("Resize", "u _ s", mode="cubic")],
        ["integer_pow", "sub", "abs", "max", "square", "mul"],
    ),
    "Mean": ([node("Mean", "w w w", "c"), node("Mul", "x c")], ["add"]),
    "Pow": ([node("Pow", "w e", "c"), node("Mul", "x c")], ["integer_pow"]),
    "ReduceL2": ([node("ReduceL2", "w", "c"), node("Mul", "x c")], ["square", "sqrt"]),
    "CumSum": ([node("CumSum", "w zero", "c"), node("Mul", "x c")], ["cumsum"]),
    "ScatterElements": (
        [node("ScatterElements", "w i w", "c", reduction="mul"), node("Mul", "x c")],
        ["mul"],
    ),
    "LRN": (
        [node("Unsqueeze", "x axes", "u"), node("LRN", "u", size=3, alpha=0.1)],
        ["integer_pow"],
    ),
    "PRelu": ([node("PRelu", "w w", "c"), node("Mul", "x c")], ["square"]),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_nothing_rounds_unseen(name, tmp_path):
    nodes, expected = ROUNDS[name]
    constants = {
        "w": W,
        "a": scalar(0.3),
        "b": scalar(1.1),
        "s": np.float32([1, 1, 1.5]),
        "e": models.i64(3),
        "i": models.i64(2, 1, 0),
        "axes": models.i64(1),
        "zero": scalar(0, np.int64),
    }
    model = network(nodes, [1, 3], constants, opset=18)
    single = bj.from_onnx(models.save(model, tmp_path)).single
    formulas = {node.primitive for node in trace(single, X[0], "real").constants.nodes}
    assert formulas >= set(expected)


def test_batch_norm_of_tiny_variance_behind_a_convolution(tmp_path):
    """onnxruntime folds it into the kernel, boundjax does not: both lie within the bounds."""
    random = np.random.default_rng(0)
    constants = {
        "k": random.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "b": np.full(4, 40.3, np.float32),
        "scale": np.full(4, 100.0, np.float32),
        "shift": random.normal(size=4).astype(np.float32),
        "mean": np.full(4, 40.1, np.float32),
        "variance": np.full(4, 1e-6, np.float32),
    }
    nodes = [
        node("Conv", "x k b", "z"),
        node("BatchNormalization", "z scale shift mean variance", epsilon=1e-6),
    ]
    path = models.save(network(nodes, [1, 1, 6, 6], constants), tmp_path)
    single = bj.from_onnx(path).single
    bounds = jax.jit(lambda x: bj.linear(single, rounding="float32")(bj.Box(x, x)))
    nearest = jax.jit(lambda x: bj.linear(single)(bj.Box(x, x)))
    wrong = 0
    for program in programs(path):
        for _ in range(20):
            x = random.uniform(size=(1, 6, 6)).astype(np.float32)
            (computed,) = program(x[None])
            lower, upper = bounds(x)
            assert (np.asarray(lower) <= computed).all()
            assert (computed <= np.asarray(upper)).all()
            wrong += bool((np.asarray(nearest(x).lower) > computed).any())
    assert wrong >= 8


def test_factors_of_a_gemm_are_rounded_constants(tmp_path):
    """`alpha W` and `beta b` are products, which the exact network does not round."""
    weights = {"w": models.f32(3, 2), "b": models.f32(2)}
    nodes = [node("Gemm", "x w b", alpha=0.3, beta=0.7)]
    single = bj.from_onnx(models.save(network(nodes, [1, 3], weights), tmp_path)).single
    formulas = trace(single, jax.numpy.asarray(X[0]), "real").constants.nodes
    assert [formula.primitive for formula in formulas].count("mul") == 2
