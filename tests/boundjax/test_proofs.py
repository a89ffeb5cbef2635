"""Proofs of `verify` as files: what the search proves, the checker proves again, and no more."""

import dataclasses

import jax
import numpy as np
import onnx_models
import pytest
from jax import nn
from jax import numpy as jnp
from kinked import KINKED
from properties import box

import boundjax as bj
from boundjax import check_tree, verify
from boundjax.certification import export
from boundjax.certification.trees import save_proof
from boundjax.verify import __main__ as command
from boundjax.verify import messages, worker
from boundjax.verify.network import Network

# The searched property is proved once.
pytestmark = pytest.mark.xdist_group("proofs")


def random_layers(seed, inputs, width, outputs):
    random = np.random.default_rng(seed)
    shapes = (inputs, width), (width, outputs)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def proved(folder, function, property, inputs, **options):
    """The paths of a proof and of its network."""
    result = verify.verify(function, property, method="complete", with_proof=True, **options)
    assert result.verdict == "unsat"
    bj.export_weights(
        lambda xs: function(xs[0])[None], np.zeros((1, inputs), np.float32), folder / "w.npz"
    )
    save_proof(folder / "p.npz", result.proof, folder / "w.npz")
    return folder / "p.npz", folder / "w.npz"


def status(proof, weights):
    return check_tree.main([str(proof), "--weights", str(weights)])


def least_of(function, inputs):
    grid = jnp.linspace(-1.0, 1.0, 201)
    points = jnp.stack(jnp.meshgrid(*[grid] * inputs), axis=-1).reshape(-1, inputs)
    return float(np.min(jax.jit(jax.vmap(function))(points)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The proof of two conjunctions, one of two rows; CROWN alone proves neither."""
    first, second = random_layers(3, 2, 6, 2)

    def function(x):
        return nn.relu(x @ first) @ second

    least = [least_of(lambda x, k=k: function(x)[k], 2) for k in (0, 1)]
    unsafe = f"(or (<= Y_0 {least[0] - 0.02:.5f}) (and (<= Y_1 {least[1] - 0.02:.5f}) (<= Y_0 9)))"
    folder = tmp_path_factory.mktemp("proofs")
    property = box([(-1, 1)] * 2, 2, unsafe)
    return proved(folder, function, property, 2, max_split_inputs=0)


def test_the_checker_proves_what_the_search_proved(files, capsys):
    assert status(*files) == 0
    assert capsys.readouterr().out.startswith("unsat, for float32 programs: ")
    _, arrays = check_tree.read_tree(files[0])
    assert len(arrays["units"]) >= 2
    assert (arrays["tree"] == check_tree.LEAF).sum() > 4
    assert arrays["multipliers"].any()


def changed(name, change):
    def apply(arrays):
        return arrays | {name: np.ascontiguousarray(change(arrays[name].copy()))}

    return apply


def one_leaf_less(arrays):
    last = int(np.flatnonzero(arrays["tree"] == check_tree.LEAF)[-1])
    kept = {name: arrays[name][:-1] for name in ("mix", "multipliers", "shares")}
    return arrays | kept | {"tree": np.delete(arrays["tree"], last)}


def leaves_alone(arrays):
    """Both trees are one leaf each: nothing is split."""
    kept = {name: arrays[name][:2] for name in ("mix", "multipliers", "shares")}
    return arrays | kept | {"tree": np.array([-1, -1], np.int32)}


def sides_exchanged(arrays):
    """The leaf of one side is proved on the other one."""
    order = np.arange(len(arrays["mix"]))[::-1]
    return arrays | {name: arrays[name][order] for name in ("multipliers", "shares")}


# Changes with the exit status of the checker: 2 if it refuses the file, 1 if a leaf is not proved.
CHANGES = {
    "a leaf is missing": (one_leaf_less, 2),
    "a leaf too many": (changed("tree", lambda a: np.append(a, -1)), 2),
    "an unknown split": (changed("tree", lambda a: np.where(a == 0, 10**6, a)), 2),
    "nothing is split": (leaves_alone, 1),
    "other parts": (sides_exchanged, 1),
    "a larger box": (changed("upper", lambda a: a * 2), 1),
    "a box upside down": (changed("upper", lambda a: a - 9), 2),
    "a stronger claim": (changed("offset", lambda a: a - 0.1), 1),
    "other rows": (changed("weights", lambda a: -a), 1),
    "a row without conjunction": (changed("member", lambda a: a * 0), 2),
    "negative multipliers": (changed("multipliers", lambda a: a - 1), 2),
    "negative weights of rows": (changed("mix", lambda a: -a), 2),
    "no weights of rows": (changed("mix", lambda a: a * 0), 1),
    "no multipliers": (changed("multipliers", lambda a: a * 0), 1),
    "NaN": (changed("shares", lambda a: a * np.nan), 2),
    "an element that is not there": (changed("units", lambda a: a + np.int32([0, 0, 99])), 2),
    "a kink that is not there": (changed("units", lambda a: a + np.int32([0, 1, 0])), 2),
    "a box that is not there": (changed("box", lambda a: a + 1), 2),
}


@pytest.mark.quick
@pytest.mark.parametrize("change", CHANGES)
def test_changed_proofs_prove_nothing(change, files, tmp_path, capsys):
    apply, expected = CHANGES[change]
    claims, arrays = check_tree.read_tree(files[0])
    claims = {"format": check_tree.FORM, "version": 1, **claims}
    export.write(tmp_path / "p.npz", {**apply(arrays), "json": export.encoded(claims)})
    assert status(tmp_path / "p.npz", files[1]) == expected
    printed = capsys.readouterr()
    assert printed.err.count("\n") == (expected == 2)
    assert not printed.out.startswith("unsat")


def test_a_network_with_other_ops_is_refused(tmp_path):
    property = box([(-1, 1)], 1, "(<= Y_0 -9)")
    options = {"method": "complete", "with_proof": True, "max_split_inputs": 0}
    result = verify.verify(lambda x: nn.relu(x), property, **options)
    other = lambda xs: nn.relu(nn.relu(xs))  # noqa: E731
    bj.export_weights(other, np.zeros((1, 1), np.float32), tmp_path / "w.npz")
    message = r"the network has piecewise linear ops of \[1, 1\] elements, .* searched \[1\]; give"
    with pytest.raises(ValueError, match=message):
        save_proof(tmp_path / "p.npz", result.proof, tmp_path / "w.npz")


def test_another_network_is_refused(files, tmp_path, capsys):
    first, second = random_layers(4, 2, 6, 2)
    other = jax.vmap(lambda x: nn.relu(x @ first) @ second)
    bj.export_weights(other, np.zeros((1, 2), np.float32), tmp_path / "w.npz")
    assert status(files[0], tmp_path / "w.npz") == 2
    assert "it is about another network" in capsys.readouterr().err


def test_what_prove_proves_is_proved_again(tmp_path):
    first, second = random_layers(3, 2, 6, 1)

    def function(x):
        return nn.relu(x @ first) @ second

    least = least_of(function, 2)
    result = bj.prove(
        function,
        bj.Box(-jnp.ones(2), jnp.ones(2)),
        bj.properties.all_positive([[1.0]], 0.05 - least),
        with_proof=True,
        max_split_inputs=0,
    )
    assert result.proved
    bj.export_weights(
        lambda xs: function(xs[0])[None], np.zeros((1, 2), np.float32), tmp_path / "w.npz"
    )
    bj.save_proof(tmp_path / "p.npz", result.proof, tmp_path / "w.npz")
    assert status(tmp_path / "p.npz", tmp_path / "w.npz") == 0


def test_boxes_that_are_cut(tmp_path):
    first, second = random_layers(3, 2, 6, 1)

    def function(x):
        return nn.relu(x @ first) @ second

    property = box([(-1, 1)] * 2, 1, f"(<= Y_0 {least_of(function, 2) - 0.05:.5f})")
    files = proved(tmp_path, function, property, 2)
    _, arrays = check_tree.read_tree(files[0])
    assert len(arrays["cuts"]) >= 1
    assert len(arrays["units"]) == 0
    assert status(*files) == 0


NIGHTLY = ("leaky relu", "abs", "max", "relu6", "hard tanh")


@pytest.mark.parametrize(
    "name", ["clip", "min", *(pytest.param(n, marks=pytest.mark.slow) for n in NIGHTLY)]
)
def test_every_piecewise_linear_op(name, tmp_path):
    first, second = random_layers(3, 2, 5, 1)
    kinked = KINKED[name]

    def function(x):
        return kinked(x @ first) @ second

    property = box([(-1, 1)] * 2, 1, f"(<= Y_0 {least_of(function, 2) - 0.05:.5f})")
    files = proved(tmp_path, function, property, 2, max_split_inputs=0)
    assert status(*files) == 0


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory):
    """A network as an ONNX file, and a property of it that CROWN alone does not prove."""
    first, second = (np.asarray(layer) for layer in random_layers(3, 2, 6, 1))
    nodes = [
        onnx_models.node("MatMul", "x a", "h"),
        onnx_models.node("Relu", "h", "r"),
        onnx_models.node("MatMul", "r b", "y"),
    ]
    model = onnx_models.network(nodes, (1, 2), {"a": first, "b": second})
    folder = tmp_path_factory.mktemp("onnx")
    (folder / "n.onnx").write_bytes(model.SerializeToString())
    least = least_of(lambda x: nn.relu(x @ first) @ second, 2)
    text = "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)"
    text += "(assert (and (>= X_0 -1) (<= X_0 1) (>= X_1 -1) (<= X_1 1)))"
    (folder / "p.vnnlib").write_text(f"{text}(assert (<= Y_0 {least - 0.05:.5f}))")
    (folder / "q.vnnlib").write_text(f"{text}(assert (<= Y_0 {least - 0.04:.5f}))")
    return folder / "n.onnx", folder / "p.vnnlib", folder / "q.vnnlib"


def test_a_worker_writes_the_proof_of_a_file(onnx_files, tmp_path, capsys):
    network, property, other = map(str, onnx_files)
    # All local devices divide its domains.
    assert Network(onnx_files[0]).programs.network.mesh.size == len(jax.local_devices()) == 2
    decider = worker.Decider(Network, lambda stage: None)
    path = str(tmp_path / "p.npz")
    request = messages.Request(network, property, "complete", "float32", 60.0, path)
    assert decider.answer(request) == messages.Answer("unsat", "", "unsat\n")
    assert check_tree.main([path, "--onnx", network, "--vnnlib", property]) == 0
    assert check_tree.main([path, "--onnx", network, "--vnnlib", other]) == 2
    assert "it is about another property" in capsys.readouterr().err
    missing = dataclasses.replace(request, proof=str(tmp_path / "none" / "p.npz"))
    answer = decider.answer(missing)
    assert answer.verdict == "unsat"
    assert answer.message.startswith("no proof is written: ")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "crown"], "--proof: expected --method complete with it, got crown"),
        ([], "--proof: expected a folder, got "),
    ],
)
def test_proofs_that_cannot_be_written(arguments, message, tmp_path, capsys):
    paths = ["--onnx", "n.onnx", "--vnnlib", "p.vnnlib", "--proof", str(tmp_path / "a" / "p.npz")]
    assert command.main([*paths, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_proofs_need_the_complete_method():
    property = box([(-1, 1)], 1, "(<= Y_0 -9)")
    with pytest.raises(ValueError, match="with_proof=True needs method='complete', got 'crown'"):
        verify.verify(lambda x: nn.relu(x), property, method="crown", with_proof=True)
