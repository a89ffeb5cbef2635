"""ONNX networks of several inputs and outputs: arguments, choices, bounds, verdicts."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax import vnnlib
from boundjax.onnx import OnnxError
from boundjax.verify.network import Network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import onnx_models as models  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from onnx_models import f32, node, scalar  # noqa: E402
from onnx_structures import value  # noqa: E402

pytestmark = pytest.mark.sampled(3)

# `y = a w - relu(b)`, `z = [a, b]`, and `k`, a constant; `n` is needed by `m` alone.
NODES = [
    node("MatMul", "a w", "p"),
    node("Relu", "b", "r"),
    node("Sub", "p r", "y"),
    node("Concat", "a b", "z", axis=-1),
    node("Identity", "w", "k"),
    node("Cast", "n", "t", to=TensorProto.FLOAT),
    node("Mul", "p t", "m"),
]
W = f32(2, 3)


def several(inputs=("a", "b"), outputs=("y", "z", "k")):
    shapes = {"a": [1, 2], "b": ["batch", 3], "n": [1, 3]}
    kinds = {"n": TensorProto.INT64}
    graph = helper.make_graph(
        NODES if "n" in inputs else NODES[:-2],
        "network",
        [value(name, kinds.get(name, TensorProto.FLOAT), shapes[name]) for name in inputs],
        [value(name) for name in outputs],
        [onnx.numpy_helper.from_array(W, "w")],
    )
    imports = [helper.make_operatorsetid("", 17)]
    return helper.make_model(graph, ir_version=8, opset_imports=imports)


def load(tmp_path, model=None, **options):
    return bj.from_onnx(models.save(model or several(), tmp_path), **options)


A, B = f32(5, 2, seed=2), f32(5, 3, seed=3)


def test_arguments_and_results_in_file_order(tmp_path):
    model = load(tmp_path)
    assert (model.input_names, model.output_names) == (("a", "b"), ("y", "z", "k"))
    assert model.input_shapes == ((2,), (3,))
    assert model.output_shapes == ((3,), (5,), (2, 3))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    expected = session.run(None, {"a": A[:1], "b": B[:1]})
    results = model.single(A[0], B[0])
    assert isinstance(results, tuple)
    for result, wanted, shape in zip(results, expected, model.output_shapes, strict=True):
        np.testing.assert_allclose(result, wanted.reshape(shape), rtol=1e-6)
    y, z, k = model(A, B)
    assert (y.shape, z.shape, k.shape) == ((5, 3), (5, 5), (5, 2, 3))
    np.testing.assert_array_equal(y[0], results[0])
    for attribute in ("input_name", "input_shape", "output_name", "output_shape"):
        role = attribute.partition("_")[0]
        with pytest.raises(ValueError, match=f"the network has [23] {role}s .*; ask for {role}_n"):
            getattr(model, attribute)


def test_wrong_arguments(tmp_path):
    model = load(tmp_path)
    with pytest.raises(ValueError, match=r"^expected 2 inputs \('a', 'b'\), got 1$"):
        model.single(A[0])
    with pytest.raises(ValueError, match=r"^input 'b' must be float32 of shape \(3,\), got"):
        model.single(A[0], A[0])


def test_a_choice_by_name(tmp_path):
    model = several(("a", "n", "b"), ("y", "z", "k", "m"))
    network_of_two = load(tmp_path, model, inputs=("b", "a"), outputs="y")
    assert (network_of_two.input_names, network_of_two.output_name) == (("b", "a"), "y")
    every = load(tmp_path)
    np.testing.assert_array_equal(network_of_two.single(B[0], A[0]), every.single(A[0], B[0])[0])
    two = load(tmp_path, outputs=["k", "y"])
    assert [v.shape for v in two.single(A[0], B[0])] == [(2, 3), (3,)]
    one = load(tmp_path, inputs="a", outputs=["k"])
    np.testing.assert_array_equal(one.single(A[0]), W)


CHOICES = {
    "integers": ({}, "input 'n': expected float32, got int64; leave it out with inputs="),
    "needed": (
        {"inputs": "a", "outputs": "y"},
        "the outputs 'y' depend on the input 'b', which inputs= leaves out",
    ),
    "needed integers": ({"inputs": "a", "outputs": "m"}, "depend on the input 'n'"),
    "input": ({"inputs": "c"}, "inputs: expected some of 'a', 'n', 'b', got 'c'"),
    "output": ({"outputs": ["y", "q"]}, "outputs: expected some of 'y', 'z', 'k', 'm', got 'q'"),
    "none": ({"outputs": ()}, "outputs: expected at least one name and none twice"),
    "twice": ({"outputs": ("y", "y")}, "outputs: expected at least one name and none twice"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choices_that_are_refused(case, tmp_path):
    options, message = CHOICES[case]
    with pytest.raises(OnnxError) as caught:
        load(tmp_path, several(("a", "n", "b"), ("y", "z", "k", "m")), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_output_that_is_an_input(tmp_path):
    model = load(tmp_path, several(("a", "b"), ("b", "y")))
    first, _ = model.single(A[0], B[0])
    np.testing.assert_array_equal(first, B[0])


def test_bounds_of_one_input_and_of_a_part_of_a_vector(tmp_path):
    model = load(tmp_path, outputs=("y", "z"))
    x = jnp.concatenate([A[0], B[0]])

    def joined(x):
        return model.single(x[:2], x[2:])

    samples = jax.random.uniform(jax.random.key(0), (100, 5), minval=x - 0.1, maxval=x + 0.1)
    bounds = jax.jit(bj.linear(joined))(bj.Box(x - 0.1, x + 0.1))
    for y, (lower, upper) in zip(jax.vmap(joined)(samples), bounds, strict=True):
        assert (lower - 1e-6 <= y.min(0)).all()
        assert (y.max(0) <= upper + 1e-6).all()
    fixed = bj.interval(lambda a: model.single(a, B[0])[0])(bj.Box(A[0] - 0.1, A[0] + 0.1))
    width = 0.2 * np.abs(W).sum(0)
    np.testing.assert_allclose(fixed.upper - fixed.lower, width, rtol=1e-5)


# X_0, X_1 are `a`, X_2 to X_4 are `b`; Y_0 to Y_2 are `y`, Y_3 to Y_7 are `z`.
BOX = "".join(
    f"(declare-const X_{k} Real)(assert (>= X_{k} {low}))(assert (<= X_{k} {high}))"
    for k, (low, high) in enumerate([(0, 1), (1, 1), (-1, 2), (0, 0), (0, 0)])
)
Y = "".join(f"(declare-const Y_{k} Real)" for k in range(8))


@pytest.mark.parametrize(
    ("unsafe", "verdict"),
    [
        ("(>= Y_5 2.1)", "unsat"),  # z_2 = b_0
        ("(>= Y_5 1.9)", "sat"),
        ("(<= Y_4 0.9)", "unsat"),  # z_1 = a_1
        (f"(<= Y_0 {W[1, 0] + min(W[0, 0], 0) - 2.1})", "unsat"),
        (f"(<= Y_0 {W[1, 0] + min(W[0, 0], 0) - 1.9})", "sat"),
        # Of an input and an output: z_2 = b_0 is X_2.
        ("(and (<= X_0 X_2) (<= (+ Y_5 0.1) X_0))", "unsat"),
        ("(and (> X_0 X_2) (<= (+ Y_5 0.1) X_0))", "sat"),
    ],
)
def test_verdicts_count_elements_in_file_order(unsafe, verdict, tmp_path):
    plain = models.save(several(outputs=("y", "z")), tmp_path)
    path = tmp_path / "model.onnx.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    network = Network(path)
    x = np.concatenate([A[0], B[0]])
    np.testing.assert_allclose(network.programs.forward(x), network.evaluate(x), rtol=1e-6)
    result = network.verify(vnnlib.parse(f"{BOX}{Y}(assert {unsafe})"), "crown", 60.0)
    assert result.verdict == verdict
    if verdict == "sat":
        point = result.counterexample
        np.testing.assert_array_equal(point.outputs, network.evaluate(point.inputs))


def test_products_of_dequantized_weights_are_those_of_the_file(tmp_path):
    """onnxruntime replaces them by products of 8-bit numbers unless it is told not to."""
    nodes = [node("DequantizeLinear", "w s", "f"), node("MatMul", "x f")]
    weights = np.arange(-9, 9, dtype=np.int8).reshape(6, 3)
    model = models.network(nodes, [1, 6], {"w": weights, "s": scalar(0.05)})
    network = Network(models.save(model, tmp_path))
    x = f32(6)
    exact = x @ (weights * np.float32(0.05))
    np.testing.assert_allclose(network.evaluate(x), exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(network.programs.forward(x), exact, rtol=1e-5, atol=1e-6)


def test_a_hidden_value_may_be_an_output(tmp_path):
    model = load(tmp_path, outputs=("p", "y"))
    hidden, result = model.single(A[0], B[0])
    np.testing.assert_allclose(hidden, A[0] @ W, rtol=1e-6)
    np.testing.assert_array_equal(result, load(tmp_path, outputs="y").single(A[0], B[0]))
