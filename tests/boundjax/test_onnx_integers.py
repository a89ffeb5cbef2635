"""ONNX integers that depend on the input: bounds only where float32 determines them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host

import boundjax as bj
from boundjax import verify, vnnlib
from boundjax.onnx import OnnxError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as models
from onnx import TensorProto
from onnx_models import f32, i64, network, node, scalar, single

INT32, INT64, FLOAT = TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT
# The largest float32 that fits an int32, and the next one.
MOST, TOO_MUCH = 2147483520.0, 2147483648.0


def balls_and_boxes(function):
    """Bounds of every output by `bj.lipschitz`."""

    def result(box):
        shape = jax.eval_shape(function, box.lower).shape
        size = int(np.prod(shape))
        ends = bj.lipschitz(function)(box, jnp.eye(size).reshape(size, *shape))
        return bj.Interval(*(end.reshape(shape) for end in ends))

    return result


TRANSFORMS = {
    "interval": bj.interval,
    "crown-ibp": bj.linear,
    "crown": lambda f: bj.linear(f, intermediate="linear"),
    "constant": lambda f: bj.linear(f, slopes="constant"),
    "alpha-crown": lambda f: bj.linear(f, slopes=bj.optimized(steps=2)),
    "forward": bj.forward_linear,
    "bcp": balls_and_boxes,
}
each_transform = pytest.mark.parametrize(
    "transform",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "alpha-crown" else [])
        for name in TRANSFORMS
    ],
)


def integers(nodes, shape=(1, 3), constants=None):
    """A network that casts its input to the integers `i` and the result of `nodes` to float32."""
    to = INT32 if any(v.dtype == np.int32 for v in (constants or {}).values()) else INT64
    first, last = node("Cast", "x", "i", to=to), node("Cast", "z", to=FLOAT)
    return network([first, *nodes, last], list(shape), constants)


def cast(to, *between):
    """Mul by 1, then the ops `between`, then Cast to an integer type and back."""
    names = ["a", *(f"b{k}" for k in range(len(between)))]
    nodes = [node("Mul", "x one", "a")]
    nodes += [node(op, names[k], names[k + 1]) for k, op in enumerate(between)]
    nodes += [node("Cast", names[-1], "i", to=to), node("Cast", "i", to=FLOAT)]
    return network(nodes, [1, 1], {"one": scalar(1.0)})


def bounds_of(model, tmp_path, boxes, transform="interval"):
    """Bounds over boxes, compiled once; ends are one per input or one for all."""
    imported = bj.from_onnx(models.save(model, tmp_path))
    shape = (len(boxes), *imported.input_shape)
    ends = [np.stack([np.broadcast_to(box[k], shape[1:]) for box in boxes]) for k in range(2)]

    @on_host
    @jax.vmap
    def result(lower, upper):
        return TRANSFORMS[transform](imported.single)(bj.Box(lower, upper))

    lower, upper = result(*(jnp.asarray(end, jnp.float32) for end in ends))
    return np.asarray(lower), np.asarray(upper)


def bounds(model, tmp_path, lower, upper, transform="interval"):
    """Bounds over one box."""
    return tuple(end[0] for end in bounds_of(model, tmp_path, [(lower, upper)], transform))


BELOW = float(np.nextafter(np.float32(-TOO_MUCH), np.float32(-np.inf)))
HELD = [(0.0, MOST), (-TOO_MUCH, 0.0), (-1.5, 1000.25), (5.5, 5.5), (-TOO_MUCH, MOST)]
NOT_HELD = [(0.0, TOO_MUCH), (BELOW, 0.0), (3e9, 4e9), (3e9, 3e9), (BELOW, BELOW), (-1e30, 1e30)]


@each_transform
def test_a_cast_has_bounds_where_its_type_holds_the_interval(transform, tmp_path):
    ends = bounds_of(cast(INT32), tmp_path, [*HELD, *NOT_HELD], transform)
    low, high = (end[:, 0] for end in ends)
    assert np.isnan([low, high])[:, len(HELD) :].all()
    low, high = low[: len(HELD)], high[: len(HELD)]
    exact = np.trunc(np.float32(HELD)).T
    slack = 1e-6 * np.abs(exact).max(0)  # linear bounds round
    assert (np.abs([low, high] - exact) <= slack).all()


def test_the_range_is_that_of_the_file_s_type(tmp_path):
    wide = bounds(cast(INT64), tmp_path, 0.0, 2.0**62)
    assert np.isfinite(wide).all()
    assert np.isnan(bounds(cast(INT64), tmp_path, 0.0, 2.0**63)).all()
    # A cast of int64 to int32 wraps around.
    nodes = [node("Cast", "i", "j", to=INT32), node("Identity", "j", "z")]
    assert np.isnan(bounds(integers(nodes), tmp_path, 0.0, 3e9)).all()
    assert np.isfinite(bounds(integers(nodes), tmp_path, 0.0, 2e9)).all()


@pytest.mark.parametrize("between", [(), ("Floor",), ("Round",), ("Ceil",)])
def test_elements_are_held_or_not_each_by_itself(between, tmp_path):
    nodes = [node(op, "x", "a") for op in between] or [node("Identity", "x", "a")]
    nodes += [node("Cast", "a", "i", to=INT32), node("Cast", "i", to=FLOAT)]
    low, high = bounds(network(nodes, [1, 3]), tmp_path, [0.2, -5e9, 7.0], [4e9, 0.0, 9.0])
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [True, True, False]
    assert (low[2], high[2]) == (7.0, 9.0)


def test_no_bound_comes_back_behind_a_cast_that_overflows(tmp_path):
    """Neither a clip nor a comparison turns the lost bound into a certificate."""
    nodes = [
        node("Cast", "x", "i", to=INT32),
        node("Cast", "i", "f", to=FLOAT),
        node("Clip", "f low high", "c"),
        node("Greater", "f low", "p"),
        node("Where", "p c f"),
    ]
    model = network(nodes, [1, 1], {"low": scalar(-1.0), "high": scalar(1.0)})
    for transform in ("interval", "crown", "forward", "bcp"):
        assert np.isnan(bounds(model, tmp_path, 0.0, 3e9, transform)).all(), transform


ARITHMETIC = {
    "add": (integers([node("Add", "i i", "z")]), 2.0**23, 2.0**24),
    "add_constant": (integers([node("Add", "i c", "z")], constants={"c": i64(7)}), 2.0**24 - 8, 0),
    "subtract": (integers([node("Sub", "i c", "z")], constants={"c": i64(-7)}), 2.0**24 - 8, 0),
    "multiply": (integers([node("Mul", "i i", "z")]), 4080.0, 4112.0),
    "sum": (integers([node("Sum", "i i i", "z")]), 5e6, 6e6),
    "negate": (integers([node("Neg", "i", "z")]), 2.0**24, 2.0**25),
    "absolute": (integers([node("Abs", "i", "z")]), 2.0**24, 2.0**25),
    "total": (
        integers([node("ReduceSum", "i axes", "z")], constants={"axes": i64(1)}),
        5592405.0,
        5592406.0,
    ),
}


@pytest.mark.parametrize("case", ARITHMETIC)
@pytest.mark.sampled(4)
def test_integer_arithmetic_has_bounds_up_to_2_to_the_24(case, tmp_path):
    model, held, too_large = ARITHMETIC[case]
    too_large = too_large or 2.0**24
    for transform in ("interval", "crown-ibp"):
        boxes = [(16.0 - held, held), (0.0, too_large)]
        low, high = bounds_of(model, tmp_path, boxes, transform)
        assert np.isfinite([low[0], high[0]]).all()
        assert np.isnan([low[1], high[1]]).all()
    imported = bj.from_onnx(tmp_path / "model.onnx")
    for x in (16.0 - held, held):
        x = np.full((3,), x, np.float32)
        y = np.asarray(imported.single(x))
        assert (low[0] <= y).all()
        assert (y <= high[0]).all()
        if case != "sum":  # onnxruntime has none for integers
            expected = models.reference(tmp_path / "model.onnx", x[None])
            np.testing.assert_array_equal(y, expected.reshape(y.shape))


def test_an_int32_that_wraps_around_has_no_bounds(tmp_path):
    model = integers(
        [node("Mul", "i c", "z")], constants={"c": np.asarray([2**16], np.int32)}, shape=(1, 1)
    )
    path = models.save(model, tmp_path)
    assert models.reference(path, np.float32([[40000.0]]))[0] < 0  # 2^31 and more
    assert np.isnan(bounds(model, tmp_path, 0.0, 40000.0)).all()
    np.testing.assert_array_equal(bounds(model, tmp_path, 0.0, 200.0), ([0.0], [200.0 * 2**16]))


def test_comparisons_and_moves_of_large_integers_are_exact(tmp_path):
    nodes = [node("Max", "i c", "m"), node("Transpose", "m", "t"), node("Min", "t i", "z")]
    low, high = bounds(integers(nodes, (1, 1), {"c": i64(5)}), tmp_path, 1.0, 2.0**60)
    np.testing.assert_array_equal((low, high), ([1.0], [2.0**60]))


def test_one_hot_casts_indices_that_are_no_integers(tmp_path):
    """The operator's definition casts them to int64: they are rounded towards 0 where possible."""
    constants = {"depth": np.float32([3]), "values": f32(2)}
    model = network([node("OneHot", "x depth values")], [1, 2], constants)
    path = models.save(model, tmp_path)
    x = np.float32([[2.7, -1.2], [0.0, 1.9]])
    off, on = constants["values"]
    # onnxruntime before 1.32 does not cast them.
    expected = [[[off, off, on], [off, off, on]], [[on, off, off], [off, on, off]]]
    np.testing.assert_array_equal(bj.from_onnx(path)(x), np.float32(expected))
    low, high = bounds(model, tmp_path, [2.1, 0.0], [2.9, 2.0**63])
    assert (low[0] == high[0]).all()  # decided; entries of the second row may have either value
    assert (low[1] == constants["values"].min()).all()
    assert (high[1] == constants["values"].max()).all()


def test_constants_that_no_integer_type_holds(tmp_path):
    def network_of(value, to=INT32):
        nodes = [
            node("Cast", "c", "i", to=to),
            node("Cast", "i", "f", to=FLOAT),
            node("Add", "x f"),
        ]
        return models.save(network(nodes, [1, 1], {"c": scalar(value)}), tmp_path)

    assert bj.from_onnx(network_of(-7.9)).single(np.zeros(1, np.float32)) == -7.0
    assert bj.from_onnx(network_of(-TOO_MUCH)).single(np.zeros(1, np.float32)) == -TOO_MUCH
    for value in (TOO_MUCH, 3e9, -3e9, np.nan, np.inf):
        with pytest.raises(OnnxError, match=r"expected numbers that int32 can hold, got "):
            bj.from_onnx(network_of(value))
    assert bj.from_onnx(network_of(3e9, INT64)).single(np.zeros(1, np.float32)) == 3e9
    with pytest.raises(OnnxError, match="expected numbers that int64 can hold"):
        bj.from_onnx(network_of(2.0**63, INT64))
    pads = {"pads": i64(0, 1, 0, 0), "fill": scalar(2**24 + 1, np.int64)}
    path = models.save(integers([node("Pad", "i pads fill", "z")], constants=pads), tmp_path)
    with pytest.raises(OnnxError, match=r"has integers beyond 2\^24"):
        bj.from_onnx(path)


@pytest.mark.parametrize("to", [TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16])
def test_casts_to_narrower_types_are_refused(to, tmp_path):
    with pytest.raises(OnnxError, match="casts a computed value to"):
        bj.from_onnx(models.save(single("Cast", [1, 3], to=to), tmp_path))


def test_an_overflow_is_no_proof(tmp_path):
    """Comparing with onnxruntime at a few points would not notice the overflow."""
    nodes = [
        node("Mul", "x s", "a"),
        node("Cast", "a", "i", to=INT32),
        node("Cast", "i", to=FLOAT),
    ]
    model = network(nodes, [1, 1], {"s": scalar(3e9)})
    path = models.save(model, tmp_path)
    imported = bj.from_onnx(path)
    text = (
        "(declare-const X_0 Real)(declare-const Y_0 Real)"
        "(assert (and (>= X_0 0) (<= X_0 {})))(assert (<= Y_0 -1e6))"
    )

    def evaluate(x):
        return models.reference(path, [x])[0].reshape(-1)

    def decide(upper):
        property = vnnlib.parse(text.format(upper))
        return verify.verify(
            imported.single, property, method="crown", timeout=60, evaluate=evaluate
        )

    assert evaluate(np.float32([0.9]))[0] < -1e6
    result = decide(1.0)
    assert result.verdict == "sat"  # as decided by onnxruntime
    assert result.counterexample.outputs[0] < -1e6
    assert decide(0.5).verdict == "unsat"


CASTS = {
    "int8": lambda x: (1e3 * x).astype(jnp.int8).astype(jnp.float32),
    "uint8_of_negative": lambda x: (x - 5.0).astype(jnp.uint8).astype(jnp.float32),
    "int32_of_floor": lambda x: jnp.floor(3e9 * x).astype(jnp.int32).astype(jnp.float32),
}
KEPT = {
    "int16_of_int32": lambda x: (9.0 * x).astype(jnp.int32).astype(jnp.int16).astype(jnp.float32),
    "bool": lambda x: x.astype(bool).astype(jnp.float32),
    "count": lambda x: (x > 0).sum().astype(jnp.float32)[None],
    "chosen": lambda x: jnp.where(x > 0, 1, 2).astype(jnp.float32),
}


@each_transform
@pytest.mark.parametrize("case", CASTS | KEPT)
@pytest.mark.sampled(4)
def test_plain_functions_of_perturbed_integers(case, transform):
    """JAX's own casts have no bounds outside of the range of their type, so none is wrong there."""
    box = bj.Box(-jnp.ones(3), jnp.ones(3))
    bounds = TRANSFORMS[transform]((CASTS | KEPT)[case])(box)
    bounds = bounds.interval() if isinstance(bounds, bj.BallBox) else bounds
    if case in CASTS:
        assert not np.isfinite(bounds.lower).any()
        assert not np.isfinite(bounds.upper).any()
        return
    values = jax.vmap(KEPT[case])(jnp.linspace(-1.0, 1.0, 201)[:, None] * jnp.ones((1, 3)))
    np.testing.assert_allclose(bounds.lower, values.min(0), atol=1e-5)
    np.testing.assert_allclose(bounds.upper, values.max(0), atol=1e-5)


def test_products_of_predicates_are_refused():
    def function(x):
        return ((x > 0) @ jnp.ones((3, 2), bool)).astype(jnp.float32)

    with pytest.raises(bj.UnsupportedOpError, match=r"test_onnx_integers\.py"):
        bj.interval(function)(bj.Box(-jnp.ones(3), jnp.ones(3)))


@pytest.mark.parametrize("method", ["interval", "crown", "bcp"])
def test_certify_proves_nothing_of_casts_out_of_range(method):
    certificate = bj.certify(CASTS["int8"], jnp.zeros((2, 3)), 0.5, norm=2, method=method)
    assert not np.asarray(certificate.verified).any()


@pytest.mark.parametrize("rounding", ["nearest", "real", "float32"])
@pytest.mark.parametrize(
    ("comparison", "expected"),
    [("Equal", 2), ("Greater", 1), ("GreaterOrEqual", 3), ("Less", 0), ("LessOrEqual", 2)],
)
def test_counts_of_right_predictions(comparison, expected, rounding, tmp_path):
    """As networks that segment images end: their classes beside those that the input demands.

    Every element is decided, so the count is known, whatever sums and casts round.
    """
    nodes = [
        node("Slice", "x zero two first", "logits"),
        node("ArgMax", "logits", "i", axis=1, keepdims=0),
        node("OneHot", "i depth values", "hot"),
        node("Cast", "hot", "classes", to=INT64),
        node("Gather", "classes one", "predicted", axis=2),
        node("Slice", "x two three first", "wanted"),
        node("Squeeze", "wanted first", "flat"),
        node("Cast", "flat", "demanded", to=INT64),
        node(comparison, "predicted demanded", "hit"),
        node("Cast", "hit", "hits", to=INT64),
        node("ReduceSum", "hits first", "count"),
        node("Cast", "count", to=FLOAT),
    ]
    constants = {
        "zero": i64(0), "one": scalar(1, np.int64), "two": i64(2), "three": i64(3),
        "first": i64(1), "depth": scalar(2, np.int64), "values": np.float32([0, 1]),
    }  # fmt: skip
    imported = bj.from_onnx(models.save(network(nodes, [1, 3, 3], constants), tmp_path))
    logits = np.float32([[0.0, 1.0, 0.2], [0.5, 0.0, 0.9]])
    lower = jnp.asarray(np.vstack([logits, np.float32([[1.0, 0.0, 0.0]])]))
    upper = jnp.asarray(np.vstack([logits + 0.3, np.float32([[1.0, 0.0, 0.0]])]))
    assert imported.single(upper) == expected
    options = {"intermediate": "linear", "rounding": rounding}
    count = bj.linear(imported.single, **options)(bj.Box(lower, upper))
    np.testing.assert_allclose(count, [[expected], [expected]], atol=1e-5)
