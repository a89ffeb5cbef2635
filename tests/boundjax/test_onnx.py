"""The ONNX reader against onnxruntime: public networks, single operators, untrusted files."""

import builtins
import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax import verify, vnnlib
from boundjax.onnx import OnnxError
from boundjax.onnx.expansions import EXPANSIONS
from boundjax.onnx.operators import OPERATORS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as models  # noqa: E402
import onnx_operator_models as operator_models  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from onnx_models import IMAGE, f32, i64, network, node, scalar, single  # noqa: E402
from onnx_structures import STRUCTURES  # noqa: E402

CASES = {**models.CASES, **STRUCTURES}
SUITES = Path(__file__).resolve().parents[3] / "shared" / "suites" / "public"
FILES = [str(path.relative_to(SUITES)) for path in sorted(SUITES.glob("*/*.onnx"))]


def examples(shape, count=2):
    rng = np.random.default_rng(0)
    uniform, normal = rng.uniform(size=(count, *shape)), rng.normal(size=(count, *shape))
    return np.concatenate([uniform, normal]).astype(np.float32)


def check(path, count=2):
    """The imported model agrees with onnxruntime."""
    model = bj.from_onnx(path)
    x = examples(model.input_shape, count)
    expected = models.reference(path, x).reshape(len(x), *model.output_shape)
    result = np.asarray(jax.jit(model)(x))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
    return model


@pytest.mark.parametrize("file", FILES)
def test_public_network(file, shared):
    check(shared / "suites" / "public" / file)


# --- operators ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_operator(case, tmp_path):
    check(models.save(CASES[case], tmp_path))


def test_every_operator_is_tested():
    """Also in graphs of nodes."""
    tested = set()

    def add(nodes):
        for message in nodes:
            tested.add(message.op_type)
            for attribute in message.attribute:
                add(attribute.g.node)

    tables = [*CASES.values(), *(model for model, _ in operator_models.OPERATORS.values())]
    for model in tables:
        add(model.graph.node)
    named = {f.name for model in CASES.values() for f in model.functions}
    assert OPERATORS.keys() | EXPANSIONS.keys() == tested - named


# --- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "example", "output"),
    [
        ([1, 3, 2], (3, 2), (6,)),
        (["batch", 3, 2], (3, 2), (6,)),
        ([0, 3, 2], (3, 2), (6,)),
        ([4, 3], (4, 3), (4, 3)),
        ([3], (3,), (1, 3)),
    ],
)
def test_batch_dimension(shape, example, output, tmp_path):
    operator = single("Flatten", shape, axis=0 if len(shape) == 1 else 1)
    model = bj.from_onnx(models.save(operator, tmp_path))
    assert (model.input_shape, model.output_shape) == (example, output)
    assert (model.input_name, model.output_name, model.opset) == ("x", "y", 17)
    x = examples(example)
    assert model(x).shape == (len(x), *output)
    assert jnp.array_equal(model(x)[1], model.single(x[1]))


def test_initializers_among_the_inputs(tmp_path):
    model = single("Add", [1, 3], f32(3))
    model.graph.input.append(helper.make_tensor_value_info("c0", TensorProto.FLOAT, [3]))
    check(models.save(model, tmp_path))


def test_dead_nodes_are_not_read(tmp_path):
    model = network([node("Relu", "x"), node("NonZero", "x", "unused")], [1, 3])
    check(models.save(model, tmp_path))


def test_only_what_depends_on_the_input_is_traced(tmp_path):
    model = bj.from_onnx(models.save(CASES["flatten_by_shape"], tmp_path))
    equations = jax.make_jaxpr(model.single)(jnp.zeros(model.input_shape)).eqns
    assert {str(equation.primitive) for equation in equations} <= {
        "broadcast_in_dim",
        "reshape",
        "squeeze",
    }


@pytest.mark.parametrize("x", [np.zeros(4, np.float32), np.zeros(3, np.int32)])
def test_example_of_another_shape(x, tmp_path):
    model = bj.from_onnx(models.save(single("Relu", [1, 3]), tmp_path))
    with pytest.raises(ValueError, match=r"one example must be float32 of shape \(3,\), got"):
        model.single(x)


# --- bounds ------------------------------------------------------------------------------------


def contains(model, centre, radius):
    """Interval and linear bounds hold on sampled inputs."""
    centre = jnp.asarray(centre, jnp.float32)
    box = bj.Box(centre - radius, centre + radius)
    samples = jax.random.uniform(
        jax.random.key(0), (200, *centre.shape), minval=box.lower, maxval=box.upper
    )
    y = jax.jit(model)(samples)
    widths = []
    for transform in (bj.interval, bj.linear):
        bounds = jax.jit(transform(model.single))(box)
        slack = 1e-4 * (1 + jnp.abs(y).max())
        assert (bounds.lower <= y.min(0) + slack).all()
        assert (bounds.upper >= y.max(0) - slack).all()
        widths.append(jnp.sum(bounds.upper - bounds.lower))
    assert widths[1] <= widths[0] * 1.001


BOUNDED = ("smoke/test_small.onnx", "reach_prob/vdp.onnx", "rl/cartpole.onnx", "tll/tll_8_0.onnx")


@pytest.mark.parametrize("file", [file for file in FILES if file in BOUNDED])
def test_bounds_of_public_network(file, shared):
    model = bj.from_onnx(shared / "suites" / "public" / file)
    contains(model, examples(model.input_shape)[0], 0.05)


def test_bounds_of_an_image_network(tmp_path):
    nodes = [
        node("Conv", "x k b", "a", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("BatchNormalization", "a b b b s", "n"),
        node("LeakyRelu", "n", "r"),
        node("AveragePool", "r", "p", kernel_shape=[2, 2], pads=[1, 0, 0, 0]),
        node("Flatten", "p", "f"),
        node("Gemm", "f w", "g", transB=1),
        node("Clip", "g low high", "c"),
        node("Softmax", "c"),
    ]
    constants = {
        "k": f32(3, 2, 3, 3),
        "b": f32(3),
        "s": np.abs(f32(3)),
        "w": 0.2 * f32(4, 27),
        "low": scalar(-3.0),
        "high": scalar(3.0),
    }
    model = check(models.save(network(nodes, [1, 2, 6, 8], constants), tmp_path))
    contains(model, examples(model.input_shape)[0], 0.02)


def test_bounds_of_a_count(tmp_path):
    model = bj.from_onnx(models.save(CASES["one_hot_count"], tmp_path))
    x = examples(model.input_shape)[0]
    bounds = bj.interval(model.single)(bj.Box(x - 1e-3, x + 1e-3))
    assert jnp.array_equal(bounds.lower, model.single(x))
    assert jnp.array_equal(bounds.upper, model.single(x))


# --- gradients ---------------------------------------------------------------------------------

DILATED = {
    "dilations": {"kernel_shape": [2, 2], "dilations": [3, 2]},
    "pads": {"kernel_shape": [3, 2], "dilations": [2, 2], "strides": [2, 1], "pads": [1, 1, 2, 0]},
    "ceil": {"kernel_shape": [2, 3], "dilations": [2, 1], "strides": [3, 2], "ceil_mode": 1},
}


@pytest.mark.parametrize("case", DILATED)
def test_dilated_pooling_has_the_gradient_of_finite_differences(case, tmp_path):
    model = check(models.save(single("MaxPool", IMAGE, **DILATED[case]), tmp_path))
    x, weights = (f32(4, *shape, seed=3) for shape in (model.input_shape, model.output_shape))

    def total(x, weights):
        return jnp.sum(weights * model.single(x))

    gradient = jax.jit(jax.vmap(jax.grad(total)))(x, weights)
    for seed in range(3):
        step = 1e-3 * f32(*x.shape, seed=seed)  # no two entries are as near to each other
        ahead, behind = (jax.vmap(total)(x + sign * step, weights) for sign in (1, -1))
        change = 2.0 * jnp.sum(gradient * step, axis=(1, 2, 3))
        np.testing.assert_allclose(ahead - behind, change, atol=2e-5)


def test_an_attack_passes_dilated_pooling(tmp_path):
    """Gradients lead to a corner of many inputs, which random points never hit."""
    nodes = [
        node("MaxPool", "x", "m", kernel_shape=[2, 2], dilations=[3, 2]),
        node("Flatten", "m", "f"),
        node("MatMul", "f w"),
    ]
    model = network(nodes, IMAGE, {"w": np.ones((64, 1), np.float32)})
    imported = bj.from_onnx(models.save(model, tmp_path))
    count = 4 * 7 * 6
    text = "(declare-const Y_0 Real)(assert (<= Y_0 -63.99))" + "".join(
        f"(declare-const X_{i} Real)(assert (>= X_{i} -1))(assert (<= X_{i} 1))"
        for i in range(count)
    )
    result = verify.verify(
        imported.single,
        vnnlib.parse(text),
        method="interval",
        input_shape=imported.input_shape,
    )
    assert (result.verdict, result.note) == ("sat", "")


# --- files that are refused --------------------------------------------------------------------


def edited(model, edit):
    edit(model)
    return model


def doubling(count):
    """A model of a few nodes with a value of 2^count elements."""
    nodes = [node("Concat", f"v{k} v{k}", f"v{k + 1}", axis=0) for k in range(count)]
    return network(
        [*nodes, node("ReduceSum", f"v{count}", "s"), node("Add", "x s")], [1, 3], {"v0": f32(2)}
    )


HUGE = i64(2**40)
BAD = {
    "operator": (single("NonZero", [1, 3]), "node 'tested' (NonZero): this operator is not"),
    "no_name": (network([node("NonZero", "x")], [1, 3]), "node 'y' (NonZero)"),
    "domain": (
        network([helper.make_node("Relu", ["x"], ["y"], domain="com.evil")], [1, 3]),
        "node 'y' (com.evil.Relu): this operator is not",
    ),
    "attribute": (single("Relu", [1, 3], alpha=1.0), "attribute 'alpha' is not supported"),
    "attribute_type": (
        single("Flatten", [1, 3], axis="x"),
        "attribute axis: expected int, got str",
    ),
    "auto_pad": (
        single("ConvTranspose", IMAGE, f32(4, 2, 3, 3), auto_pad="SAME"),
        "attribute auto_pad: 'SAME' is not supported",
    ),
    "training": (
        single("BatchNormalization", IMAGE, *f32(4, 4), training_mode=1),
        "attribute training_mode: only 0",
    ),
    "second_output": (
        network(
            [
                node("MaxPool", "x", "a b", kernel_shape=[2]),
                node("Cast", "b", to=TensorProto.FLOAT),
            ],
            [1, 2, 4],
        ),
        "value 2 of node 'a' (MaxPool) is not supported",
    ),
    "unknown_shape": (
        network([node("Cast", "x", "s", to=7), node("Reshape", "x s")], [1, 3]),
        "operand 2, 's', depends on the network's input",
    ),
    "integers": (
        network([node("Cast", "x", "s", to=7), node("Relu", "s")], [1, 3]),
        "expected operands of one type (float32), got integer",
    ),
    "integers_divided": (
        network([node("Cast", "x", "s", to=7), node("Div", "s w")], [1, 3], {"w": i64(2)}),
        "divides integers that depend on the input",
    ),
    "large_integers": (
        network([node("Cast", "x", "s", to=7), node("Add", "s w")], [1, 3], {"w": i64(2**30)}),
        "has integers beyond 2^24",
    ),
    "half": (
        single("Add", [1, 3], f32(3).astype(np.float16)),
        "got float32, float16, bfloat16 or double",
    ),
    "double_cast": (
        single("Cast", [1, 3], to=TensorProto.DOUBLE),
        "casts a computed value to float64; boundjax computes in float32",
    ),
    "mixed": (single("Add", [1, 3], i64(3)), "got float32, integer"),
    "operand_shape": (single("MatMul", [1, 3], f32(4, 2)), "node 'tested' (MatMul): its operands"),
    "reshape": (single("Reshape", [1, 3], i64(2, 2)), "expected a shape for 3 elements"),
    "kernel": (single("Conv", IMAGE, f32(2, 3, 3, 3)), "expected a kernel for 4 channels"),
    "gather": (single("Gather", [1, 3], i64(3), axis=1), "out of range for an axis of length 3"),
    "operands": (network([node("Relu", "x x")], [1, 3]), "expected 1 to 1 operands, got 2"),
    "undefined": (network([node("Relu", "z")], [1, 3]), "gives the value 'z'"),
    "twice": (network([node("Relu", "x", "y")] * 2, [1, 3]), "'y', which exists already"),
    "no_output": (network([node("Relu", "x", "z")], [1, 3]), "output 'y': no earlier node"),
    "bool": (
        single("Greater", [1, 3], f32(3), output=TensorProto.BOOL),
        "output 'y': expected numbers, got bool",
    ),
    "dynamic": (single("Relu", ["n", "width"]), "got ('?', '?'); export with fixed sizes"),
    "dynamic_vector": (single("Relu", ["n"]), "expected fixed sizes"),
    "no_graph": (onnx.ModelProto(ir_version=8), "got a file without a graph"),
    "no_opset": (
        edited(single("Relu", [1, 3]), lambda m: m.ClearField("opset_import")),
        "expected one version of the default operator set",
    ),
    "inputs": (
        edited(single("Relu", [1, 3]), lambda m: m.graph.input.add().CopyFrom(m.graph.output[0])),
        "input 'y': expected a shape, got none",
    ),
    "one_output_twice": (
        edited(single("Relu", [1, 3]), lambda m: m.graph.output.add().CopyFrom(m.graph.output[0])),
        "expected distinct outputs, got 'y', 'y'",
    ),
    "too_few_elements": (
        edited(single("Add", [1, 3], f32(3)), lambda m: m.graph.initializer[0].dims.append(2**40)),
        "expected shape (3, 1099511627776), got 3 elements",
    ),
    "negative_size": (
        edited(
            single("Add", [1, 3], f32(3)), lambda m: m.graph.initializer[0].dims.extend([-1, -1])
        ),
        "initializer 'c0': expected shape (3, -1, -1)",
    ),
    "large_input": (single("Relu", [1, 2**40]), "raise max_bytes if you trust the file"),
    "large_constant": (
        network([node("ConstantOfShape", "s", "z"), node("Add", "x z")], [1], {"s": HUGE}),
        "(ConstantOfShape): the shape (1099511627776,) needs 8796093022208 bytes",
    ),
    "large_expand": (single("Expand", [1, 1], HUGE), "(Expand): the shape"),
    "large_known_expand": (
        network([node("Expand", "w s", "e"), node("Add", "x e")], [1], {"w": f32(1), "s": HUGE}),
        "(Expand): the shape",
    ),
    "large_range": (
        network(
            [node("Range", "a b c", "r"), node("Cast", "r", "f", to=1), node("Add", "x f")],
            [1],
            {
                "a": scalar(-(2**62), np.int64),
                "b": scalar(2**62, np.int64),
                "c": scalar(1, np.int64),
            },
        ),
        "(Range): the shape",
    ),
    "large_tile": (single("Tile", [1, 1], i64(1, 2**40)), "(Tile): the shape"),
    "large_pad": (single("Pad", [1, 3], i64(0, 0, 0, 2**40)), "(Pad): the shape"),
    "large_one_hot": (
        network(
            [node("ArgMax", "x", "k"), node("OneHot", "k d v")], [1, 3], {"d": HUGE, "v": f32(2)}
        ),
        "(OneHot): the shape",
    ),
    "large_product": (
        network(
            [node("Mul", "v w", "z"), node("ReduceSum", "z", "s"), node("Add", "x s")],
            [1],
            {"v": f32(9999, 1), "w": f32(99999)},
        ),
        "(Mul): ",
    ),
    "doubling": (doubling(40), "(Concat): "),
    "newline": (
        network([node("NonZero", "x", name="a\nb" * 99)], [1, 3]),
        r"node 'a\nba\nb",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file(case, tmp_path):
    model, message = BAD[case]
    with pytest.raises(OnnxError) as caught:
        bj.from_onnx(models.save(model, tmp_path), max_bytes=2**24)
    text = str(caught.value)
    assert message in text
    assert text.startswith("model.onnx: ")
    assert "\n" not in text
    assert len(text) <= 500


def test_folded_constants_share_one_budget(tmp_path):
    nodes = [node("ConstantOfShape", "s", f"z{k}") for k in range(8)]
    names = " ".join(f"z{k}" for k in range(8))
    model = network([*nodes, node("Sum", f"x {names}")], [1], {"s": i64(1000)})
    path = models.save(model, tmp_path)
    bj.from_onnx(path, max_bytes=40_000)
    with pytest.raises(OnnxError, match="all constants together needs 20000 bytes"):
        bj.from_onnx(path, max_bytes=19_000)


@pytest.mark.parametrize("content", [b"", b"not an ONNX file", b"\x08\x07", b"\x00" * 64])
def test_other_files(content, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(OnnxError, match="expected an ONNX model"):
        bj.from_onnx(path)


def test_truncated_files(tmp_path):
    content = CASES["conv"].SerializeToString()
    path = tmp_path / "model.onnx"
    for end in range(0, len(content), 37):
        path.write_bytes(content[:end])
        with pytest.raises(OnnxError):
            bj.from_onnx(path)


def test_damaged_files(tmp_path):
    """A file with one changed byte gives a model or an OnnxError."""
    content = CASES["transposed_strides"].SerializeToString()
    path = tmp_path / "model.onnx"
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(OnnxError):
            bj.from_onnx(path)


def test_large_file(tmp_path):
    path = models.save(CASES["conv"], tmp_path)
    with pytest.raises(
        OnnxError, match=r"the file needs \d+ bytes, expected at most 100; raise max"
    ):
        bj.from_onnx(path, max_bytes=100)


def test_suffix_chooses_no_parser(tmp_path):
    path = models.save(single("Relu", [1, 3]), tmp_path)
    check(path.rename(tmp_path / "model.json"))


def test_device():
    with pytest.raises(OnnxError, match="null: expected a regular file"):
        bj.from_onnx("/dev/null")


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        bj.from_onnx(tmp_path / "absent.onnx")


def test_without_the_package(monkeypatch, tmp_path):
    path = models.save(single("Relu", [1, 3]), tmp_path)
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "onnx" or name.startswith("onnx."):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        ImportError, match=r"needs the package onnx: pip install 'boundjax\[onnx\]'"
    ):
        bj.from_onnx(path)
