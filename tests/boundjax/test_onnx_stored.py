"""ONNX weights of other types than float32, and quantized inputs: rounding and refusals."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import boundjax as bj
from boundjax.onnx import OnnxError
from boundjax.tracing.trace import trace
from boundjax.transforms.errors import ErrorAnalysis

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as models  # noqa: E402
import onnx_structures as structures  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from onnx_models import f32, i64, network, node, scalar  # noqa: E402

pytestmark = pytest.mark.sampled(3)

FLOAT = TensorProto.FLOAT


def load(model, folder, **options):
    return bj.from_onnx(models.save(model, folder), **options)


def refused(model, folder, message):
    with pytest.raises(OnnxError) as caught:
        load(model, folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def at_a_point(model, x, rounding):
    within = jax.jit(lambda x: bj.interval(model.single, rounding=rounding)(bj.Box(x, x)))
    return [np.asarray(end, np.float64) for end in within(x)]


def exactly(values):
    return [Fraction(int(v) if v.dtype.kind == "i" else float(v)) for v in values]


# Weights that float32 cannot hold, and their exact values.
DOUBLES = np.float64([1 + 2**-25, -1 / 3, 3.0, -1e15 * (1 + 2**-50), 0.0])
LARGE, BIASES = i64(2**24 + 1, -(2**53) - 1, 2**62 - 1, 5), np.int32([2**31 - 1, -(2**24) - 1, 1])
TENTH = np.float32(0.1)
CAST = node("Cast", "w", "f", to=FLOAT)
ROUNDED = {
    "doubles": ([CAST], {"w": DOUBLES}, exactly(DOUBLES)),
    "moved doubles": (
        [node("Reshape", "w s", "v"), node("Cast", "v", "f", to=FLOAT)],
        {"w": DOUBLES[:, None], "s": i64(1, 5)},
        exactly(DOUBLES),
    ),
    "integers": ([CAST], {"w": LARGE}, exactly(LARGE)),
    "dequantized": (
        [node("DequantizeLinear", "w s z", "f")],
        {"w": np.int8([3, -100, 77]), "s": TENTH, "z": scalar(-7, np.int8)},
        [Fraction(n + 7) * Fraction(float(TENTH)) for n in (3, -100, 77)],
    ),
    "dequantized int32": (
        [node("DequantizeLinear", "w s", "f")],
        {"w": BIASES, "s": TENTH},
        [v * Fraction(float(TENTH)) for v in exactly(BIASES)],
    ),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_what_stored_weights_round_is_charged(case, tmp_path, monkeypatch):
    """The difference between a weight and what it is rounded to, which no program sees."""
    nodes, constants, exact = ROUNDED[case]
    nodes = [*nodes, node("Sub", "f g", "t"), node("Mul", "x t")]
    nearest = np.float32([float(v) for v in exact])
    path = models.save(network(nodes, [1, len(exact)], constants | {"g": nearest}), tmp_path)
    model, x = bj.from_onnx(path), np.ones(len(exact), np.float32)
    exact = [v - Fraction(float(g)) for v, g in zip(exact, nearest, strict=True)]

    def hold(lower, upper):
        ends = zip(lower, exact, upper, strict=True)
        return [Fraction(float(low)) <= v <= Fraction(float(high)) for low, v, high in ends]

    for rounding in ("real", "float32"):
        lower, upper = at_a_point(model, x, rounding)
        assert all(hold(lower, upper))
        assert (upper - lower <= 2e-5 * np.abs(nearest) + 1e-16).all()
    computed = models.reference(path, x[None]).ravel()
    assert ((lower <= computed) & (computed <= upper)).all()
    nothing = lambda self, node, position: 0.0 * node.constant(position)  # noqa: E731
    monkeypatch.setattr(ErrorAnalysis, "_of_constant", nothing)
    assert not all(hold(*at_a_point(model, x, "real")))


@pytest.mark.parametrize(
    "values",
    [
        np.float64([1.0, -3.5, 2**-120, np.inf, 0.0]),
        np.float16([1.1, -3.5, 6e-8, 65504, 0]),
        np.asarray([1.1, -3.5, 1e-30, 3e38, 0], ml_dtypes.bfloat16),
        np.int8([-128, 127, 0, 5, 1]),
        np.uint16([65535, 0, 1, 2, 3]),
        i64(2**24, -(2**24), 0, 1, 2),
    ],
)
def test_exact_casts_cost_nothing(values, tmp_path):
    nodes = [node("Cast", "w", "f", to=FLOAT), node("Add", "x f")]
    model = load(network(nodes, [1, 5], {"w": values}), tmp_path)
    np.testing.assert_array_equal(model.single(np.zeros(5, np.float32)), values.astype(np.float32))
    traced = trace(model.single, jnp.zeros(5), "real")
    assert all(n.primitive == "input" for n in traced.constants.nodes)


def test_a_number_between_two_steps_is_charged_a_whole_step(tmp_path):
    """`0.35 / 0.1` is above 3.5 for the numbers of float32, and rounds to it or not."""
    scale, w = np.float32(0.1), np.float32([0.35, 0.25, 0.31])
    nodes = [
        node("QuantizeLinear", "w s z", "q"),
        node("DequantizeLinear", "q s z", "f"),
        node("Mul", "x f"),
    ]
    constants = {"w": w, "s": scale, "z": scalar(0, np.int8)}
    path = models.save(network(nodes, [1, 3], constants, 13), tmp_path)
    x = np.ones(3, np.float32)
    lower, upper = at_a_point(bj.from_onnx(path), x, "real")
    ratios = [Fraction(float(v)) / Fraction(float(scale)) for v in w]
    exact = [round(ratio) * Fraction(float(scale)) for ratio in ratios]
    for low, value, high in zip(lower, exact, upper, strict=True):
        assert Fraction(float(low)) <= value <= Fraction(float(high))
    assert ((upper - lower)[:2] > 0.09).any()
    assert (upper - lower)[2] < 1e-6
    computed = models.reference(path, x[None]).ravel()
    assert ((lower <= computed) & (computed <= upper)).all()


def test_a_quantized_input_is_a_step_function(tmp_path):
    """Bounds of a step are the steps that the interval meets, clipped to the type."""
    model = load(structures.quantized(scalar(3, np.uint8)), tmp_path)  # steps of 0.1
    x = np.float32([0.02, 0.06, 0.3, -0.28, -0.4, 30.0, 0.0, 25.3, 0.2])
    r = np.float32([0.02, 0.02, 0.06, 0.01, 0.3, 1.0, 100.0, 0.02, 0.0])
    lower, upper = bj.interval(model.single)(bj.Box(x - r, x + r))
    steps = [
        (0, 0), (0, 1), (2, 4), (-3, -3), (-3, -1), (252, 252), (-3, 252), (252, 252), (2, 2)
    ]  # fmt: skip
    np.testing.assert_allclose(lower, [0.1 * low for low, _ in steps], atol=1e-5)
    np.testing.assert_allclose(upper, [0.1 * high for _, high in steps], atol=1e-5)


STORED = {
    "half arithmetic": (
        structures.product(
            [node("Mul", "w w", "v"), node("Cast", "v", "f", to=FLOAT)],
            {"w": f32(6, 3).astype(np.float16)},
        ),
        "expected operands of one type (float32 or integer), got float16, bfloat16 or double",
    ),
    "double arithmetic": (
        structures.product(
            [node("Exp", "w", "v"), node("Cast", "v", "f", to=FLOAT)],
            {"w": np.zeros((6, 3))},
        ),
        "got float16, bfloat16 or double",
    ),
    "perturbed double": (
        network(
            [node("Cast", "x", "d", to=TensorProto.DOUBLE), node("Cast", "d", to=FLOAT)], [1, 3]
        ),
        "casts a computed value to float64; boundjax computes in float32",
    ),
    "rounds to half": (
        structures.product(
            [
                node("Cast", "w", "h", to=TensorProto.FLOAT16),
                node("Cast", "h", "f", to=FLOAT),
            ],
            {"w": f32(6, 3)},
        ),
        "expected numbers that float16 can hold",
    ),
    "too large": (
        structures.cast_weights(np.full((6, 3), 1e39)),
        "1e+39 is outside of what float32 can hold",
    ),
    "too small": (
        structures.cast_weights(np.full((6, 3), 1e-310)),
        "1e-310 is outside of what float32 can hold",
    ),
    "out of range": (
        structures.product(
            [node("Cast", "w", "q", to=TensorProto.INT8), node("Cast", "q", "f", to=FLOAT)],
            {"w": np.full((6, 3), 128.0, np.float32)},
        ),
        "expected numbers that int8 can hold, got 128.0",
    ),
    "half scale": (
        structures.dequantized(structures.INT8, scalar(0.1, np.float16), opset=19),
        "expected a scale of float32; boundjax computes in no other precision",
    ),
    "scales": (
        structures.dequantized(structures.INT8, np.float32([1, 2])),
        "expected a scale of one number, or of 3 for axis 1 of (6, 3), got shape (2,)",
    ),
    "zero points": (
        structures.dequantized(structures.INT8, structures.SCALES, scalar(1, np.int8)),
        "expected a scale and a zero point of one shape",
    ),
    "small integers": (
        network(
            [
                node("QuantizeLinear", "x s z", "q"),
                node("Add", "q q", "r"),
                node("DequantizeLinear", "r s z"),
            ],
            [1, 3],
            {"s": scalar(0.1), "z": scalar(0, np.int8)},
        ),
        "(Add): expected operands of one type (float32 or integer), got integers of 8 or 16 bits",
    ),
    "double among operands": (
        models.single("Clip", [1, 3], np.float64(0.1)),
        "operand 2, 'c0', is float64; expected float32",
    ),
    "double output": (
        network([node("Identity", "w", "y")], [1, 3], {"w": np.float64([0.1])}),
        "output 'y': expected float32, got a constant of another precision",
    ),
    "strings": (
        network([node("Add", "x w")], [1, 1], {"w": np.array(["a"], object)}),
        "initializer 'w': expected float32, another type of floats, integers or bool, got string",
    ),
}


@pytest.mark.parametrize("case", STORED)
def test_stored_types_that_are_refused(case, tmp_path):
    model, message = STORED[case]
    refused(model, tmp_path, message)


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT16"])
def test_numbers_that_are_not_stored_as_bytes(kind, tmp_path):
    """In the lists of the message, not in its raw data."""
    numbers = [1.5, 2.0, -3.0] if "INT" not in kind else [1, 2, 3]
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), [3], numbers)
    assert not tensor.HasField("raw_data")
    model = network([node("Cast", "w", "f", to=FLOAT), node("Add", "x f")], [1, 3])
    model.graph.initializer.append(tensor)
    y = load(model, tmp_path).single(np.zeros(3, np.float32))
    np.testing.assert_array_equal(y, numbers)


def test_quantized_networks_share_programs(tmp_path):
    one, other = (
        load(structures.dequantized(structures.INT8 // d, structures.SCALES * d), tmp_path)
        for d in (1, 2)
    )
    assert one.structure == other.structure
    assert len(one.weights) == 2
