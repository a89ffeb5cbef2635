"""ONNX control flow, functions, recurrent layers: bounds and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.onnx import OnnxError, builder

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as models  # noqa: E402
import onnx_structures as structures  # noqa: E402
from onnx import TensorProto  # noqa: E402
from onnx_models import f32, network, node, scalar  # noqa: E402
from onnx_structures import STRUCTURES, branch, call, function, graph, loop  # noqa: E402

pytestmark = pytest.mark.sampled(3)

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def load(model, folder, **options):
    return bj.from_onnx(models.save(model, folder), **options)


def refused(model, folder, message):
    with pytest.raises(OnnxError) as caught:
        load(model, folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STRUCTURES)
@pytest.mark.sampled(6)
def test_interval_bounds_hold_for_the_runtime(case, tmp_path):
    """Under "float32" they hold for its outputs digit by digit, at a point as well."""
    path = models.save(STRUCTURES[case], tmp_path)
    single = bj.from_onnx(path).single
    bounds = jax.jit(lambda low, high: bj.interval(single, rounding="float32")(bj.Box(low, high)))
    random = np.random.default_rng(0)
    x = random.normal(size=bj.from_onnx(path).input_shape).astype(np.float32)
    for radius in np.float32([0.0, 0.2]):
        low, high = x - radius, x + radius
        samples = np.concatenate(
            [
                random.uniform(low, high, size=(20, *x.shape)),
                np.where(random.random((10, *x.shape)) < 0.5, low, high),
            ]
        )
        y = models.reference(path, np.clip(samples.astype(np.float32), low, high))
        lower, upper = bounds(low, high)
        y = y.reshape(len(samples), *lower.shape)
        assert (np.asarray(lower) <= y).all()
        assert (y <= np.asarray(upper)).all()


LINEAR = ("loop", "branches_in_a_loop", "functions_in_functions", "quantized", "rnn_affine")


@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.sampled(6)
def test_linear_bounds_hold(case, tmp_path):
    model = load(STRUCTURES[case], tmp_path)
    x = f32(*model.input_shape)
    box = bj.Box(x - 0.1, x + 0.1)
    lower, upper = jax.jit(bj.linear(model.single))(box)
    shares = np.random.default_rng(0).random((200, *x.shape)).round(1).astype(np.float32)
    y = jax.jit(model)(x - 0.1 + 0.2 * shares)
    slack = 1e-5 * (1 + jnp.abs(y).max())
    assert (lower - slack <= y.min(0)).all()
    assert (upper + slack >= y.max(0)).all()
    assert jnp.sum(upper - lower) < 4 * jnp.sum(y.max(0) - y.min(0))


def test_a_long_sequence_is_bounded_step_by_step(tmp_path):
    """Longer than the tracer unrolls."""
    model = load(structures.recurrent("RNN", steps=200, given="B", output=1), tmp_path)
    x = f32(*model.input_shape)
    lower, upper = jax.jit(bj.interval(model.single))(bj.Box(x - 0.01, x + 0.01))
    y = jax.jit(model)(x + 0.01 * np.sign(f32(50, *x.shape)))
    assert (lower <= y.min(0)).all()
    assert (y.max(0) <= upper).all()
    assert jnp.isfinite(upper - lower).all()


def test_sequences_by_batch_are_those_by_step_transposed(tmp_path):
    """Which onnxruntime cannot compute."""
    for operator in ("RNN", "GRU", "LSTM"):
        for output in (0, 1):
            options = {"batch": 2, "directions": 2, "output": output, "given": "B"}
            one, other = (
                load(structures.recurrent(operator, **options, layout=layout), tmp_path)
                for layout in (0, 1)
            )
            x = f32(*one.input_shape)
            moved = np.transpose(one.single(x), (2, 0, 1, 3) if output == 0 else (1, 0, 2))
            y = other.single(np.swapaxes(x, 0, 1))
            np.testing.assert_allclose(y, moved, rtol=0, atol=1e-6)


# --- control flow ------------------------------------------------------------------------------

ENDLESS = [*structures.STEP[:4], node("Identity", "c", "d"), node("Identity", "v", "s")]
POSITIVE = node("ReduceMax", "u", "most", keepdims=0), node("Greater", "most zero", "d")
PERTURBED_LOOP = [*structures.STEP[:4], *POSITIVE, node("Identity", "v", "s")]


def nested_loops(depth):
    """Loops of 100 steps in each other."""
    body = graph(
        [node("Identity", "c", "d"), node("Neg", "v", "u")], f"i:{INT64} c:{BOOL} v", f"d:{BOOL} u"
    )
    for k in range(depth):
        names = f"i{k}:{INT64} c{k}:{BOOL} a{k}", f"d{k}:{BOOL} b{k}"
        nodes = [
            node("Identity", f"c{k}", f"d{k}"),
            node("Loop", f"m true a{k}", f"b{k}", body=body),
        ]
        body = graph(nodes, *names)
    constants = {"m": scalar(100, np.int64), "true": structures.TRUE}
    return network([node("Loop", "m true x", body=body)], [1, 3], constants)


def deep(depth):
    inner = graph([node("Relu", "x", "t0")], outputs="t0")
    for k in range(1, depth):
        both = {"then_branch": inner, "else_branch": structures.NEGATIVE}
        inner = graph([node("If", "c", f"t{k}", **both)], outputs=f"t{k}")
    return branch(structures.TRUE, then_branch=inner)


def doubling(count):
    """Functions that call the next one twice."""
    calls = [call(f"F{k + 1}", "a", "p") for k in range(count)]
    functions = [
        function(f"F{k}", "a", "b", [calls[k], call(f"F{k + 1}", "p", "b")]) for k in range(count)
    ]
    last = function(f"F{count}", "a", "b", [node("Neg", "a", "b")])
    return structures.with_functions([call("F0", "x")], [*functions, last])


def missing_reference():
    made = structures.referring("Elu", "x", "y", alpha=("slope", onnx.AttributeProto.FLOAT))
    return network([made], [1, 3])


CONTROL = {
    "condition": (
        network(
            [
                node("ReduceMax", "x", "m", keepdims=0),
                node("Greater", "m zero", "c"),
                node(
                    "If",
                    "c",
                    then_branch=structures.RELU,
                    else_branch=structures.NEGATIVE,
                ),
            ],
            [1, 3],
            {"zero": scalar(0.0)},
        ),
        "node 'y' (If): its condition depends on the network's input; only constant ones",
    ),
    "loop condition": (
        loop(PERTURBED_LOOP, outputs="y all", zero=scalar(0.0)),
        "node 'loop' (Loop): its condition depends on the network's input",
    ),
    "trip count": (
        network(
            [
                node("ReduceMax", "x", "r", keepdims=0),
                node("Cast", "r", "m", to=INT64),
                *loop(outputs="y all").graph.node,
            ],
            [1, 3],
            {"true": structures.TRUE, "w": structures.W},
        ),
        "node 'loop' (Loop): its trip count depends on the network's input",
    ),
    "endless": (
        loop(ENDLESS, names="_ _ x", outputs="y all"),
        "needs more than 500 nodes once loops",
    ),
    "steps": (
        loop(count=2**62, outputs="y all"),
        "needs more than 500 nodes once loops and functions are",
    ),
    "loops": (nested_loops(3), "needs more than 500 nodes once loops and functions are"),
    "functions": (doubling(25), "needs more than 500 nodes once loops and functions are"),
    "deep": (deep(32), "graphs and functions are nested more than 30 deep"),
    "recursion": (
        structures.with_functions(
            [call("F", "x")], [function("F", "a", "b", [call("F", "a", "b")])]
        ),
        "graphs and functions are nested more than 30 deep",
    ),
    "rounded condition": (
        network(
            [
                node("Mul", "s s", "t"),
                node("Less", "t s", "p"),
                node("Not", "p", "c"),
                *branch(structures.TRUE).graph.node,
            ],
            [1, 6],
            {"s": scalar(0.1)},
        ),
        "node 'y' (If): its condition depends on rounding; expected an exact constant",
    ),
    "kind of condition": (branch(scalar(1.0)), "expected a condition of bool, got float32"),
    "shape of condition": (branch(np.array([True, False])), "expected an operand of one element"),
    "stack of no steps": (
        loop(count=0, after=[node("Identity", "all")]),
        "value 2 of node 'loop' (Loop), a loop of no steps, has no known shape",
    ),
    "carried": (
        loop(names="m true x x", outputs="y z all"),
        "expected a body of 4 inputs and at least 3 outputs",
    ),
    "no graph": (network([node("If", "c")], [1], {"c": structures.TRUE}), "expected a graph"),
    "shadow": (
        loop([node("Identity", "v", "w"), *structures.STEP], outputs="y all"),
        "node 'w' (Identity): gives the value 'w', which exists already",
    ),
    "inner name": (
        network(
            [
                *branch(structures.TRUE).graph.node[:0],
                node("If", "c", "z", then_branch=structures.RELU, else_branch=structures.RELU),
                node("Neg", "t"),
            ],
            [1, 3],
            {"c": structures.TRUE},
        ),
        "gives the value 't'",
    ),
    "old scan": (
        network([node("Scan", "_ x", body=structures.RELU, num_scan_inputs=1)], [1, 3], opset=8),
        "only the form since operator set 9",
    ),
    "attribute of a function": (
        structures.with_functions(
            [call("Leaky", "x w", "y", other=1.0)],
            [structures.LEAKY],
            constants={"w": structures.W},
        ),
        "(mine.Leaky): expected at most 2 operands, 2 values and the attributes 'slope'",
    ),
    "reference": (missing_reference(), "attribute 'alpha': expected to stand in a function"),
    "function of the default domain": (
        structures.with_functions(
            [node("Relu", "x")], [function("Relu", "a", "b", [node("Neg", "a", "b")], domain="")]
        ),
        "expected local functions outside of the default domain, got 'Relu'",
    ),
    "two functions": (
        structures.with_functions([call("Leaky", "x x")], [structures.LEAKY] * 2),
        "expected distinct local functions",
    ),
    "unknown domain": (
        structures.with_functions([call("Unknown", "x")], [structures.LEAKY]),
        "node 'y' (mine.Unknown): this operator is not supported",
    ),
}


@pytest.mark.parametrize("case", CONTROL)
def test_control_flow_that_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "MAX_NODES", 500)
    model, message = CONTROL[case]
    refused(model, tmp_path, message)


def test_the_limit_counts_what_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "MAX_NODES", 4 * 7)
    model = loop(count=4, outputs="y all")
    load(model, tmp_path)
    monkeypatch.setattr(builder, "MAX_NODES", 4 * 7 - 1)
    refused(model, tmp_path, "needs more than 27 nodes")


def test_a_branch_that_is_not_taken_is_not_computed(tmp_path):
    unknown = graph([node("NonZero", "x", "e")], outputs="e")
    model = load(branch(structures.TRUE, else_branch=unknown), tmp_path)
    np.testing.assert_array_equal(model.single(f32(6)), np.maximum(f32(6), 0))
    refused(branch(structures.FALSE, else_branch=unknown), tmp_path, "(NonZero): this operator")


# --- recurrent layers --------------------------------------------------------------------------

RECURRENT = {
    "lengths": (
        network(
            [node("Cast", "x", "n", to=TensorProto.INT32), node("RNN", "x W R _ n", "_ y")],
            [4, 1, 2],
            {"W": f32(1, 3, 2), "R": f32(1, 3, 3)},
        ),
        "operand 5, 'n', depends on the network's input",
    ),
    "direction": (
        structures.recurrent("GRU", directions=2, direction="forward"),
        "attribute direction: expected one of forward, reverse, bidirectional for weights of 2",
    ),
    "activation": (
        structures.recurrent("RNN", activations=["ThresholdedRelu"]),
        "attribute activations: 'ThresholdedRelu' is not supported",
    ),
    "count": (structures.recurrent("LSTM", activations=["Tanh"]), "expected 3 names, got 1"),
    "parameters": (structures.recurrent("RNN", activations=["Affine"]), "needs its alpha and beta"),
    "left over": (structures.recurrent("RNN", activation_alpha=[0.1]), "for activations alone"),
    "weights": (
        network([node("LSTM", "x W R", "y")], [4, 1, 2], {"W": f32(1, 8, 2), "R": f32(1, 12, 3)}),
        "expected weights of shape (1, 12, 2), got (1, 8, 2)",
    ),
}


@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_layers_that_are_refused(case, tmp_path):
    model, message = RECURRENT[case]
    refused(model, tmp_path, message)
