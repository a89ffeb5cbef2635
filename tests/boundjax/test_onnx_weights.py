"""Weights of ONNX networks as arguments: the same graphs and bounds, programs that are shared."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from boundjax import vnnlib
from boundjax.ir.node import Perturbed
from boundjax.onnx import from_onnx
from boundjax.search.programs import Programs
from boundjax.tracing.trace import trace

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as models  # noqa: E402
import suites  # noqa: E402
from onnx_models import f32, network, node, scalar  # noqa: E402
from onnx_structures import STRUCTURES  # noqa: E402

from boundjax.verify import messages, worker  # noqa: E402
from boundjax.verify.network import Compiled, Network  # noqa: E402

pytestmark = pytest.mark.sampled(4)

CASES = {**models.CASES, **STRUCTURES}
ROUNDINGS = ("nearest", "real", "float32")


def load(model, folder, name="model"):
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return from_onnx(path)


# --- graphs ------------------------------------------------------------------------------------


def graph(apply, weights, shape, rounding):
    """What a walk sees of a graph that is traced inside of `jit`, but for numbers."""
    seen = []

    def operand(value):
        known = isinstance(value, Perturbed)
        return value.index if known else (np.shape(value), str(jnp.result_type(value)))

    def traced(weights, x):
        made = trace(lambda x: apply(weights, x), x, rounding)
        for n in made.nodes:
            operands = [*map(operand, n.operands)], dict(n.formulas)
            seen.append((n.primitive, n.label, n.shape, str(n.dtype), operands))
        seen.append([n.primitive for n in made.constants.nodes])
        return 0

    jax.eval_shape(traced, weights, jax.ShapeDtypeStruct(shape, jnp.float32))
    return seen


def graphs(model, rounding):
    """With weights as constants, and as arguments."""
    shape = model.input_shape
    constants = graph(lambda weights, x: model.single(x), (), shape, rounding)
    return constants, graph(model.apply, model.weights, shape, rounding)


ROOT = np.sqrt(2 / np.pi).astype(np.float32)
GELU = {"three": scalar(3.0), "c3": scalar(0.044715), "one": scalar(1.0), "half": scalar(0.5)}


def gelu(x, root):
    """The nodes of `jax.nn.gelu`."""
    return [
        node("Pow", f"{x} three", "cube"),
        node("Mul", "c3 cube", "small"),
        node("Add", f"{x} small", "sum"),
        node("Mul", f"{root} sum", "t"),
        node("Tanh", "t", "e"),
        node("Add", "one e", "a"),
        node("Mul", "half a", "cdf"),
        node("Mul", f"{x} cdf"),
    ]


# Graphs whose bounds depend on the numbers of constants, and on constants that are equal.
SPELLED_OUT = {
    "gelu": network(
        [node("MatMul", "x w", "h"), *gelu("h", "root")],
        [1, 3],
        GELU | {"w": f32(3, 4), "root": ROOT},
    ),
    "layer norm": network(
        [
            node("ReduceMean", "x", "mean", axes=[1]),
            node("Sub", "x mean", "d"),
            node("Mul", "d d", "s"),
            node("ReduceMean", "s", "v", axes=[1]),
            node("Add", "v eps", "w"),
            node("Sqrt", "w", "r"),
            node("Div", "d r", "n"),
            node("Mul", "n gain", "g"),
            node("Add", "g shift"),
        ],
        [1, 4],
        {"eps": f32(1, 1) * 0 + np.float32(1e-5), "gain": f32(4), "shift": f32(4, seed=2)},
    ),
    "norm of scaled inputs, by two equal constants": network(
        [
            node("Mul", "x one", "d"),
            node("Mul", "x two", "e"),
            node("Mul", "e e", "s"),
            node("ReduceMean", "s", "v", axes=[1]),
            node("Add", "v eps", "w"),
            node("Sqrt", "w", "r"),
            node("Div", "d r"),
        ],
        [1, 4],
        {"eps": scalar(1e-5), "one": f32(1, 4), "two": f32(1, 4)},
    ),
    "gelu by a computed number": network(
        [node("MatMul", "c d", "root"), *gelu("x", "root")],
        [1, 3],
        GELU | {"c": np.float32([ROOT, 2.0]), "d": np.float32([1.0, 0.0])},
    ),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", SPELLED_OUT)
def test_what_depends_on_numbers_is_recognised(name, rounding, tmp_path):
    model = load(SPELLED_OUT[name], tmp_path)
    constants, arguments = graphs(model, rounding)
    assert arguments == constants
    wanted = "gelu" if name.startswith("gelu") else "normalize"
    computed = name == "gelu by a computed number" and rounding != "nearest"
    assert any(n[0].startswith(wanted) for n in arguments[:-1]) != computed


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"reduce_prod"}))
def test_the_graph_of_an_operator(case, tmp_path):
    """Of every one that has bounds."""
    model = load(CASES[case], tmp_path)
    for rounding in ROUNDINGS:
        constants, arguments = graphs(model, rounding)
        assert arguments == constants
    x = f32(*model.input_shape)
    np.testing.assert_array_equal(model.apply(model.weights, x), model.single(x))


def test_other_weights_are_another_network(tmp_path):
    one, other = (
        load(models.single("Gemm", [1, 5], f32(5, 3, seed=k), f32(3, seed=k + 1)), tmp_path)
        for k in (1, 3)
    )
    x = f32(5)
    np.testing.assert_array_equal(one.apply(other.weights, x), other.single(x))
    assert not np.allclose(one.single(x), other.single(x))


def test_an_example_of_another_shape_is_refused(tmp_path):
    model = load(models.single("Gemm", [1, 5], f32(5, 3)), tmp_path)
    with pytest.raises(ValueError, match=r"must be float32 of shape \(5,\), got float32 of shape"):
        model.apply(model.weights, f32(4))


# --- public networks ---------------------------------------------------------------------------

PUBLIC = {
    "acasxu": "1_2.onnx",
    "mnist_fc": "256x2.onnx",
    "oval21": "cifar_base_kw.onnx",
    "tll": "tll_8_0.onnx",
    "cgan": "cgan32_nCh_3.onnx",
    "sri_resnet_a": "sri_a.onnx",
    "vit": "ibp_3_3_8.onnx",
}
# CROWN of the others takes long to compile.
QUICK = ("acasxu", "mnist_fc", "oval21", "tll")
without_suites = pytest.mark.skipif(
    not suites.PUBLIC.is_dir(), reason="no suites/public/ in a folder shared/ beside the checkout"
)


@without_suites
@pytest.mark.parametrize("benchmark", PUBLIC)
def test_the_graph_of_a_public_network(benchmark):
    model = suites.model(benchmark, PUBLIC[benchmark])
    assert model.weights
    for rounding in ROUNDINGS:
        constants, arguments = graphs(model, rounding)
        assert arguments == constants


def bounds_agree(benchmark, method, rounding):
    """Equal up to the order of sums, and therefore no looser."""
    file = PUBLIC[benchmark]
    model = suites.model(benchmark, file)
    row = next(r for r in suites.table(benchmark, "instances.csv") if r["onnx"] == file)
    case = suites.asked(benchmark, row["vnnlib"]).cases[0]
    weights = np.concatenate([c.weights for c in case.conjunctions]).astype(np.float32)
    of = {
        "constants": Programs(model.single, model.input_shape, rounding=rounding),
        "arguments": Programs(
            model.apply, model.input_shape, rounding=rounding, weights=model.weights
        ),
    }
    constants, arguments = (p.bounds(method)(case.lower, case.upper, weights) for p in of.values())
    for one, other in zip(constants, arguments, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.isfinite(one).all()
        np.testing.assert_allclose(other, one, rtol=0, atol=3e-6 * np.abs(one).max())


@without_suites
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("benchmark", PUBLIC)
@pytest.mark.sampled(3)
def test_intervals_of_a_public_network(benchmark, rounding):
    bounds_agree(benchmark, "interval", rounding)


@without_suites
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("benchmark", QUICK)
@pytest.mark.sampled(3)
def test_crown_of_a_public_network(benchmark, rounding):
    bounds_agree(benchmark, "crown", rounding)


@without_suites
@pytest.mark.suites
@pytest.mark.parametrize("benchmark", sorted(PUBLIC.keys() - set(QUICK)))
def test_crown_of_a_large_public_network(benchmark):
    bounds_agree(benchmark, "crown", "float32")


# --- structures --------------------------------------------------------------------------------


def two_layers(seed=0, **changes):
    """A network `y = relu(x w + b) v + c`, with another constant, attribute or node."""
    parts = {
        "alpha": 1.0,
        "hidden": "h",
        "activation": ("Relu", {}),
        "first": "x w b",
        "scale": scalar(1.5),
        "zeros": np.zeros(2, np.float32),
        "w": f32(2, 3, seed=seed),
        "b": f32(3, seed=seed + 1),
        "v": f32(3, 2, seed=seed + 2),
        "c": f32(2, seed=seed + 3),
    } | changes
    operator, attributes = parts["activation"]
    hidden = parts["hidden"]
    nodes = [
        node("Gemm", parts["first"], hidden, alpha=parts["alpha"]),
        node(operator, hidden, "a", **attributes),
        node("Gemm", "a v c", "g"),
        node("Mul", "g scale", "s"),
        node("Add", "s zeros"),
    ]
    constants = {name: parts[name] for name in ("w", "b", "v", "c", "scale", "zeros")}
    return network(nodes, [1, 2], constants)


def test_networks_that_differ_in_weights_and_names_have_one_structure(tmp_path):
    one = load(two_layers(), tmp_path)
    assert len(one.weights) == 4
    for other in (two_layers(seed=10), two_layers(seed=10, hidden="renamed")):
        loaded = load(other, tmp_path)
        assert loaded.structure == one.structure
        assert hash(loaded.structure) == hash(one.structure)


W = f32(2, 3, seed=0)
LEAKY = ("LeakyRelu", {"alpha": 0.0})
OTHERS = {
    "attribute": {"alpha": 0.5},
    "activation": {"activation": ("Sigmoid", {})},
    "attribute of an activation": {"activation": LEAKY},
    "sign of a zero": {"activation": ("LeakyRelu", {"alpha": -0.0})},
    "number": {"scale": scalar(1.25)},
    "shape of a number": {"scale": np.float32([1.5])},
    "shape of a bias": {"b": f32(1, 3)},
    "a uniform constant": {"zeros": np.full(2, 0.5, np.float32)},
    "sign of zeros": {"zeros": -np.zeros(2, np.float32)},
    "a uniform weight": {"c": np.ones(2, np.float32)},
    "equal weights": {"c": f32(2, seed=5), "zeros": f32(2, seed=5)},
    "unequal weights": {"c": f32(2, seed=5), "zeros": f32(2, seed=6)},
    "width": {"w": f32(2, 4), "b": f32(4), "v": f32(4, 2)},
    "no bias": {"first": "x w"},
}


def test_no_two_other_networks_share_a_structure(tmp_path):
    structures = {
        name: load(two_layers(**changes), tmp_path, str(k)).structure
        for k, (name, changes) in enumerate({"none": {}, **OTHERS}.items())
    }
    for name, one in structures.items():
        same = [other for other, structure in structures.items() if structure == one]
        assert same == [name]


def test_the_wiring_is_part_of_the_structure(tmp_path):
    def crossed(order):
        nodes = [
            node("Exp", "x", "a"),
            node("Sin", "x", "b"),
            node("Sub", order),
        ]
        return load(network(nodes, [1, 2]), tmp_path)

    assert crossed("a b").structure == crossed("a b").structure
    assert crossed("a b").structure != crossed("b a").structure


def test_static_integers_are_part_of_the_structure(tmp_path):
    def gathered(*indices):
        nodes = [node("MatMul", "x w", "h"), node("Gather", "h i", axis=1)]
        return load(network(nodes, [1, 2], {"w": W, "i": models.i64(*indices)}), tmp_path)

    assert gathered(0, 1).structure == gathered(0, 1).structure
    assert gathered(0, 1).structure != gathered(1, 0).structure


# --- sharing -----------------------------------------------------------------------------------


@pytest.fixture
def compilations(caplog):
    """The names of the programs that XLA compiles."""
    caplog.set_level(logging.WARNING)

    def names():
        return [
            r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()
        ]

    with jax.log_compiles():
        yield names


UNSAFE = (
    "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)"
    "(declare-const Y_1 Real)(assert (and (<= -1 X_0) (<= X_0 1) (<= -1 X_1) (<= X_1 1)))"
    "(assert (>= Y_0 {least}))"
)
# `relu(x_0 - x_1 + 0.1) + 0.5 relu(0.9 x_1)`, up to 2.1, plus the constant.
NUMBERS = {
    "w": np.float32([[1, 0], [-1, 0.9]]),
    "b": np.float32([0.1, 0]),
    "v": np.float32([[1, 0], [0.5, 1]]),
    "scale": scalar(1.0),
}


def shifted(amount):
    return two_layers(**NUMBERS, c=np.float32([amount, 7.0]))


@pytest.fixture
def ask(tmp_path):
    """Asks a worker whether the first output of a network reaches 3; the answer's verdict."""
    decider = worker.Decider(worker._prepare(), lambda stage: None)
    (tmp_path / "p.vnnlib").write_text(UNSAFE.format(least=3))

    def ask(model, name, method="crown"):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        request = messages.Request(str(path), str(tmp_path / "p.vnnlib"), method, "float32", 60.0)
        return decider.answer(request)

    return ask


def test_networks_of_one_structure_get_their_own_answers_from_shared_programs(ask, compilations):
    assert ask(shifted(0.5), "low").verdict == "unsat"
    count = len(compilations())
    assert count > 3
    answer = ask(shifted(2.5), "high")
    assert answer.verdict == "sat"
    assert float(answer.text.split("(Y_0 ")[1].split(")")[0]) >= 3
    assert ask(shifted(0.6), "lower").verdict == "unsat"
    assert ask(shifted(1.5), "reached").verdict == "sat"
    assert compilations()[count:] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 2.0},
        {"scale": scalar(2.0)},
        {"zeros": np.full(2, 2.0, np.float32)},
    ],
)
def test_networks_that_differ_in_a_number_do_not_share(changes, ask, compilations):
    c = np.float32([0.5, 7.0])
    assert ask(two_layers(**NUMBERS, c=c), "low").verdict == "unsat"
    count = len(compilations())
    assert ask(two_layers(**NUMBERS | changes, c=c), "high").verdict == "sat"
    assert len(compilations()) > count


def test_branch_and_bound_shares_too(tmp_path, compilations):
    """More inputs than are split."""
    inputs = 24
    declared = "".join(f"(declare-const X_{k} Real)" for k in range(inputs))
    box = " ".join(f"(<= -1 X_{k}) (<= X_{k} 1)" for k in range(inputs))
    (tmp_path / "p.vnnlib").write_text(
        f"{declared}(declare-const Y_0 Real)(declare-const Y_1 Real)(assert (and {box}))"
        "(assert (>= Y_0 0.0))"
    )
    property, shared = vnnlib.load(tmp_path / "p.vnnlib"), Compiled()
    verdicts, counts = [], []
    for seed, shift in ((1, -12.0), (5, 4.0), (5, -12.0)):
        constants = {
            "w": 0.3 * f32(inputs, 8, seed=seed),
            "b": f32(8, seed=seed + 1),
            "v": f32(8, 2, seed=seed + 2),
            "c": np.float32([shift, 1.0]),
        }
        nodes = [node("Gemm", "x w b", "h"), node("Relu", "h", "a"), node("Gemm", "a v c")]
        path = models.save(network(nodes, [1, inputs], constants), tmp_path)
        result = Network(path, "float32", compiled=shared).verify(property, "complete", 60.0)
        verdicts.append(result.verdict)
        counts.append(len(compilations()))
    assert verdicts == ["unsat", "sat", "unsat"]
    assert counts[0] == counts[2] > 3


def test_programs_of_a_few_structures_are_kept():
    compiled = Compiled(most=2)
    first = compiled.of("a")
    first["program"] = 1
    compiled.of("b")
    assert compiled.of("a") is first
    compiled.of("c")  # the least recently used goes
    assert compiled.of("a") is first
    assert compiled.of("b") == {}
    assert compiled.of("c") == {}


def test_a_rounding_is_not_shared(tmp_path):
    path = models.save(two_layers(), tmp_path)
    compiled = Compiled()
    networks = [Network(path, rounding, compiled=compiled) for rounding in ("float32", "nearest")]
    box = np.float32([-1, -1]), np.float32([1, 1]), np.eye(2, dtype=np.float32)
    lower, nearest = (np.asarray(n.programs.bounds("interval")(*box)[0]) for n in networks)
    assert (lower < nearest).all()


@without_suites
def test_public_networks_of_one_architecture_share():
    """Networks of acasxu, and of tll, which has biases of zeros."""
    for benchmark, files in (
        ("acasxu", ("1_2.onnx", "5_9.onnx")),
        ("tll", ("tll_8_0.onnx", "tll_8_1.onnx")),
    ):
        one, other = (suites.model(benchmark, file) for file in files)
        assert one.structure == other.structure
    deep, base = (suites.model("oval21", f"cifar_{kind}_kw.onnx") for kind in ("deep", "base"))
    assert deep.structure != base.structure
