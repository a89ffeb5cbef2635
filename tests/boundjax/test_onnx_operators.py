"""Single ONNX operators: values and bounds against onnxruntime, and modes that are refused."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.onnx import OnnxError
from boundjax.onnx.expansions import EXPANSIONS
from boundjax.onnx.operators import OPERATORS

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as models
import onnx_operator_models as tables
from onnx_models import IMAGE, f32, i64, network, node, scalar, single
from onnx_operator_models import resized, scales

# Operators written with primitives that the table may lack.
NEEDED = {
    "acos": "acos",
    "acosh": "acosh",
    "asin": "asin",
    "atanh": "atanh",
    "mod_float": "rem",
    "mod_integers": "rem",
    "tan": "tan",
}


def samples(case, shape):
    low, high = tables.OPERATORS[case][1]
    random = np.random.default_rng(0)
    inside = random.uniform(low, high, size=(20, *shape))
    corners = random.choice([low, high], size=(20, *shape))
    # onnxruntime divides equal numbers by a variance below 0 there.
    ends = [np.full((1, *shape), end) for end in (low, high) if case != "moments"]
    return np.clip(np.concatenate([inside, corners, *ends]).astype(np.float32), low, high)


@pytest.mark.parametrize("case", tables.OPERATORS)
def test_values_are_those_of_the_runtime(case, tmp_path):
    path = models.save(tables.OPERATORS[case][0], tmp_path)
    imported = bj.from_onnx(path)
    x = samples(case, imported.input_shape)
    expected = models.reference(path, x).reshape(len(x), *imported.output_shape)
    result = np.asarray(jax.jit(imported)(x))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


# Networks whose sampled outputs fill at least this part of linear bounds.
FILLED = 0.9
LOOSE = {
    # Products and quotients of values that share inputs, and smooth functions.
    *tables.NORMS,
    *tables.POWERS,
    *tables.ELEMENTWISE,
    *(name for name in tables.REDUCTIONS if name.startswith("reduce")),
    # Sums of several inputs, whose corners are not all sampled.
    *(name for name in tables.RESIZES if not name.startswith("nearest")),
    *tables.CONVOLUTIONS,
    *(name for name in tables.MOVES if name.startswith(("cumsum", "scatter"))),
    "argmin",
    "argmin_last",
    "argmax_last",
    "mean",
    "eye_like_known",
}


@pytest.mark.parametrize("case", tables.OPERATORS)
@pytest.mark.sampled(8)
def test_bounds_hold(case, tmp_path):
    model, box = tables.OPERATORS[case]
    path = models.save(model, tmp_path)
    imported = bj.from_onnx(path)
    x = samples(case, imported.input_shape)
    expected = models.reference(path, x).reshape(len(x), *imported.output_shape)
    whole = bj.Box(*(jnp.full(imported.input_shape, end, jnp.float32) for end in box))

    @jax.jit
    def bounds(box):
        return bj.interval(imported.single)(box), bj.linear(imported.single)(box)

    needed = NEEDED.get(case)
    if needed is not None and needed not in {op.name for op in bj.ops.all_ops()}:
        with pytest.raises(bj.UnsupportedOpError, match=f"no bounds are known for .*'{needed}'"):
            bounds(whole)
        return
    results = bounds(whole)
    slack = 1e-5 * (1 + np.abs(expected).max())
    for lower, upper in results:
        assert (np.asarray(lower) <= expected.min(0) + slack).all()
        assert (np.asarray(upper) >= expected.max(0) - slack).all()
    if case not in LOOSE:
        spread = (expected.max(0) - expected.min(0)).sum() + 1e-4
        assert FILLED * np.sum(results[1][1] - results[1][0]) <= spread


@pytest.mark.parametrize("case", [*tables.MOVES, *tables.RESIZES, *tables.NORMS])
@pytest.mark.sampled(18)
def test_bounds_with_rounding_hold_at_points(case, tmp_path):
    """Where inputs have no width, float32 bounds are as wide as rounding."""
    path = models.save(tables.OPERATORS[case][0], tmp_path)
    imported = bj.from_onnx(path)
    x = samples(case, imported.input_shape)[::8]
    expected = models.reference(path, x).reshape(len(x), *imported.output_shape)
    within = jax.jit(lambda x: bj.linear(imported.single, rounding="float32")(bj.Box(x, x)))
    for point, computed in zip(x, expected, strict=True):
        lower, upper = map(np.asarray, within(point))
        assert (lower <= computed).all()
        assert (computed <= upper).all()
        assert (upper - lower <= 1e-3 * (1 + np.abs(computed))).all()


# --- constants that are computed from weights or attributes ---------------------------------------


def cubic(t, a=-0.75):
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def upsampled(weight, x, scale, size):
    """The rows of `x` `[n]` at `(k + 1/2) / scale - 1/2`, in float64."""
    c = (np.arange(size) + 0.5) / np.float64(np.float32(scale)) - 0.5
    taps = np.arange(-3, len(x) + 3)
    return weight(np.abs(c[:, None] - taps)) @ x[np.clip(taps, 0, len(x) - 1)]


def hat(t):
    return np.maximum(1 - t, 0)


LINE = np.float32([1e4, -2e4, 3e4])
EXACT = {
    "linear": (
        resized("linear", None, scales(1, 1, 2.3), shape=(1, 1, 3)),
        lambda x: upsampled(hat, x, 2.3, 6),
    ),
    "cubic": (
        resized("cubic", None, scales(1, 1, 2.3, 1), shape=(1, 1, 3, 1)),
        lambda x: upsampled(cubic, x, 2.3, 6),
    ),
    "range": (
        network(
            [node("Range", "a b c", "r"), node("Mul", "x r")],
            [1, 3],
            {"a": scalar(0.1), "b": scalar(0.5), "c": scalar(0.15)},
        ),
        lambda x: x * (np.float64(np.float32(0.1)) + np.arange(3) * np.float64(np.float32(0.15))),
    ),
    "scatter": (
        network(
            [node("ScatterElements", "a i b", "s", axis=0, reduction="add"), node("Mul", "x s")],
            [1, 3],
            {"a": np.float32([0.1] * 3), "i": i64(0, 1, 2), "b": np.float32([0.7, 0.4, 1e-4])},
            opset=18,
        ),
        lambda x: x * (np.float64(np.float32(0.1)) + np.float64(np.float32([0.7, 0.4, 1e-4]))),
    ),
}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.sampled(6)
def test_bounds_hold_for_exact_constants(case, tmp_path):
    """Large inputs show what the constants' rounding does; nothing else is that wide."""
    model, exact = EXACT[case]
    imported = bj.from_onnx(models.save(model, tmp_path))
    value = exact(LINE.astype(np.float64)).reshape(imported.output_shape)
    x = jnp.asarray(LINE.reshape(imported.input_shape))
    assert np.abs(np.asarray(imported.single(x), np.float64) - value).max() > 0

    @jax.jit
    def bounds(x):
        roundings = ("nearest", "real", "float32")
        return [bj.linear(imported.single, rounding=r)(bj.Box(x, x)) for r in roundings]

    holds = []
    for ends in bounds(x):
        lower, upper = (np.asarray(end, np.float64) for end in ends)
        holds.append(bool((lower <= value).all() and (value <= upper).all()))
        assert (upper - lower < 3e-4 * np.abs(LINE).max()).all()
    assert holds == [False, True, True]


@pytest.mark.parametrize("case", ["layer_norm", "instance_norm", "moments"])
@pytest.mark.sampled(6)
def test_bounds_hold_for_the_runtime_at_large_means(case, tmp_path):
    """Bounds that know of no rounding are wrong there."""
    path = models.save(tables.OPERATORS[case][0], tmp_path)
    imported = bj.from_onnx(path)
    x = 1000 + f32(*imported.input_shape)
    computed = models.reference(path, x[None]).reshape(imported.output_shape)

    @jax.jit
    def bounds(x):
        return [
            bj.linear(imported.single, rounding=r)(bj.Box(x, x)) for r in ("nearest", "float32")
        ]

    holds = [((lower <= computed) & (computed <= upper)).all() for lower, upper in bounds(x)]
    assert holds == [False, True]


def test_group_norm_proves_nothing_at_large_means(tmp_path):
    """onnxruntime subtracts the squared mean from the mean square, which cancels."""
    path = models.save(tables.OPERATORS["group_norm_21"][0], tmp_path)
    single = bj.from_onnx(path).single
    x = 1000 + f32(4, 3, 2)
    error = models.reference(path, x[None]).reshape(x.shape) - single(x)
    assert np.isfinite(error).all()
    bounds = jax.jit(lambda x: bj.linear(single, rounding="float32")(bj.Box(x, x)))
    with pytest.warns(UserWarning, match="the operand of 'rsqrt' .* leave its domain"):
        lower = np.asarray(bounds(x).lower)
    assert not np.isfinite(lower).any()


# --- refusals -------------------------------------------------------------------------------------

REFUSED = {
    "pad_mode": (
        single("Pad", [1, 3], i64(0, 1, 0, 1), mode="mirror"),
        "only 'constant', 'edge', 'reflect' and 'wrap' are supported, got 'mirror'",
    ),
    "pad_too_large": (
        single("Pad", [1, 3], i64(0, 3, 0, 1), mode="reflect"),
        "expected pads that mode 'reflect' finds among 3 elements, got 3 and 1",
    ),
    "resize_mode": (
        resized("area", None, scales(1, 1, 2, 2)),
        "attribute mode: only 'nearest', 'linear', 'cubic' are supported, got 'area'",
    ),
    "antialias": (
        resized("linear", None, scales(1, 1, 2, 2), antialias=1),
        "attribute antialias: only 0 is supported, got 1",
    ),
    "coordinates": (
        resized("linear", None, scales(1, 1, 2, 2), coordinate_transformation_mode="centre"),
        "attribute coordinate_transformation_mode: only 'align_corners', 'asymmetric', ",
    ),
    "undecided": (
        resized(
            "nearest",
            None,
            scales(1, 1, 1 / 3, 1),
            shape=(1, 1, 9, 1),
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        ),
        "element 1 of axis 2 lies at 2.9999999105930355, where rounding decides which element it",
    ),
    "early_shrinks": (
        single("Resize", [1, 1, 4, 4], scales(1, 1, 0.75, 1), opset=10),
        "expected scales of at least 1: before opset 11 it is undefined",
    ),
    "same_shape": (
        resized("linear", None, scales(1, 1, 1.1, 1.1)),
        "expected another shape than (1, 2, 4, 5), which onnxruntime copies",
    ),
    "no_scales": (resized("linear"), "expected 4 scales or sizes, got neither"),
    "huge_scales": (
        resized("linear", None, scales(1, 1, 3e38, 1)),
        "expected scales of at most 65536",
    ),
    "no_pixels": (
        resized("linear", None, scales(1, 1, 0.1, 1)),
        "expected 4 positive scales or sizes, got [1, 2, 0, 5]",
    ),
    "repeated_updates": (
        single("ScatterElements", [1, 4], np.asarray([[2, -2]]), f32(1, 2), axis=1),
        "expected an index at most 1 times, got 2; which update wins is undefined",
    ),
    "far_update": (
        single("ScatterND", [1, 4], np.asarray([[0, 4]]), f32(1)),
        "indices are out of range for an axis of length 4",
    ),
    "updates": (
        single("ScatterND", [1, 4], np.asarray([[0, 2]]), f32(2)),
        "expected updates of shape (1,), got (2,)",
    ),
    "gather_elements": (
        single("GatherElements", [1, 4], np.asarray([[4]]), axis=1),
        "indices are out of range for an axis of length 4",
    ),
    "perturbed_index": (
        network([node("Cast", "x", "i", to=7), node("GatherElements", "x i", axis=1)], [1, 3]),
        "operand 2, 'i', depends on the network's input",
    ),
    "indices_of_top_k": (
        network([node("TopK", "x k", "v i"), node("Cast", "i", to=1)], [1, 4], {"k": i64(1)}),
        "value 2 of node 'v' (TopK) is not supported",
    ),
    "power_of_norm": (
        single("LpNormalization", [1, 3], p=3),
        "attribute p: only 1 and 2 are supported, got 3",
    ),
    "stash_type": (
        single("LayerNormalization", [1, 3], f32(3), stash_type=11),
        "attribute stash_type: only 1 is supported, got 11",
    ),
    "infinite_exponent": (
        single("Pow", [1, 3], scalar(np.inf)),
        "expected finite exponents, got others",
    ),
    "fractional_power_of_integers": (
        network([node("Cast", "x", "i", to=7), node("Pow", "i k")], [1, 3], {"k": scalar(0.5)}),
        "expected constant integer exponents of at least 0 for an integer base",
    ),
    "mod_of_floats": (
        single("Mod", [1, 3], scalar(2.0)),
        "attribute fmod: expected 1 for floating-point numbers, got 0",
    ),
    "celu": (single("Celu", [1, 3], alpha=0.0), "expected a number other than 0"),
    "output_shape": (
        single("ConvTranspose", IMAGE, f32(4, 2, 3, 3), output_shape=[10, 8]),
        "expected 1 to 9 elements of spatial axis 0, got 10; what lies beyond the kernel is",
    ),
    "both_pads": (
        single("ConvTranspose", IMAGE, f32(4, 2, 3, 3), auto_pad="SAME_UPPER", pads=[1, 1, 1, 1]),
        "expected pads or auto_pad, got both (1, 1, 1, 1) and 'SAME_UPPER'",
    ),
    "blocks": (single("DepthToSpace", IMAGE, blocksize=3), "expected channels that 9 divides"),
    "block_mode": (
        single("DepthToSpace", IMAGE, blocksize=2, mode="RCD"),
        "attribute mode: expected 'DCR' or 'CRD', got 'RCD'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    model, message = REFUSED[case]
    with pytest.raises(OnnxError) as raised:
        bj.from_onnx(models.save(model, tmp_path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


# --- the documentation ----------------------------------------------------------------------------


def test_the_documented_operators_are_those_of_the_table():
    text = (Path(__file__).resolve().parents[2] / "docs" / "verification.md").read_text()
    listed = re.search(r"## Operators of ONNX\n.*?```onnx\n(.*?)```", text, re.DOTALL)
    assert listed is not None
    assert listed[1].split() == sorted(OPERATORS.keys() | EXPANSIONS.keys())
