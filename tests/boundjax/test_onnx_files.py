"""ONNX files that are compressed or have weights in other files; versions of operator sets."""

import gzip
import hashlib
import os

import numpy as np
import pytest

import boundjax as bj
from boundjax import check, check_onnx
from boundjax.onnx import OnnxError, content
from boundjax.verify import network as runtime

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models as models  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_models import f32, i64, network, node  # noqa: E402

pytestmark = pytest.mark.quick


def outside(name="w", values=None):
    """A tensor whose content is in another file."""
    tensor = numpy_helper.from_array(f32(3) if values is None else values, name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


def branch(*tensors):
    """A graph without inputs."""
    result = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    return helper.make_graph([node("Identity", "w", "r")], "branch", [], [result], tensors)


def sparse(**external):
    """A sparse tensor with one part in another file."""
    parts = {"values": f32(2), "indices": i64(0, 1)}
    message = onnx.SparseTensorProto(dims=[3])
    for name, values in parts.items():
        inside = numpy_helper.from_array(values, "s")
        getattr(message, name).CopyFrom(outside("s", values) if name in external else inside)
    return message


def with_unused(operator="Custom", domain="other", **attributes):
    """A network with a node, named `unused`, whose value nothing needs."""
    model = network([node("Relu", "x")], [1, 3])
    message = helper.make_node(operator, [], ["r"], name="unused", domain=domain, **attributes)
    model.graph.node.insert(0, message)
    return model


def edited(edit):
    model = network([node("Relu", "x")], [1, 3])
    edit(model)
    return model


def in_a_function(model, **attributes):
    constant = helper.make_node("Constant", [], ["b"], name="inner", **attributes)
    opset = [helper.make_operatorsetid("", 17)]
    model.functions.append(helper.make_function("mine", "F", ["a"], ["b"], [constant], opset))


def inner_if():
    conditional = node("If", "p", "r", then_branch=branch(outside()), else_branch=branch())
    result = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    return helper.make_graph([conditional], "middle", [], [result])


def mistyped():
    model = with_unused("Constant", "", value=outside())
    model.graph.node[0].attribute[0].type = onnx.AttributeProto.INT
    return model


def without_a_location():
    """An external tensor that only its entries reveal."""
    model = with_unused("Constant", "", value=outside())
    model.graph.node[0].attribute[0].t.data_location = TensorProto.DEFAULT
    return model


INITIALIZER, TENSOR = "initializer 'w' of node 'unused'", "tensor 'w' of node 'unused'"
OUTSIDE = {
    "initializer": (edited(lambda m: m.graph.initializer.append(outside())), "initializer 'w'"),
    "constant": (with_unused("Constant", "", value=outside()), TENSOR),
    "graph": (
        with_unused("If", "", then_branch=branch(), else_branch=branch(outside())),
        INITIALIZER,
    ),
    "graph_in_a_graph": (with_unused("If", "", then_branch=inner_if()), INITIALIZER),
    "graphs": (with_unused(parts=[branch(), branch(outside())]), INITIALIZER),
    "tensors": (with_unused(parts=[numpy_helper.from_array(f32(2), "v"), outside()]), TENSOR),
    "sparse_attribute": (
        with_unused("Constant", "", sparse_value=sparse(values=True)),
        "tensor 's' of node 'unused'",
    ),
    "sparse_attributes": (
        with_unused(parts=[sparse(), sparse(indices=True)]),
        "tensor 's' of node 'unused'",
    ),
    "sparse_initializer": (
        edited(lambda m: m.graph.sparse_initializer.append(sparse(values=True))),
        "tensor 's'",
    ),
    "sparse_indices": (
        edited(lambda m: m.graph.sparse_initializer.append(sparse(indices=True))),
        "tensor 's'",
    ),
    "function": (
        edited(lambda m: in_a_function(m, value=outside())),
        "tensor 'w' of node 'inner'",
    ),
    "training": (
        edited(lambda m: m.training_info.add().algorithm.initializer.append(outside())),
        "initializer 'w'",
    ),
    "mistyped": (mistyped(), TENSOR),
    "without_a_location": (without_a_location(), TENSOR),
}


def of_bytes(tensor):
    """The bytes of an external tensor of three or two numbers."""
    kind = np.float32 if tensor.data_type == TensorProto.FLOAT else np.int64
    return np.arange(np.prod(tensor.dims)).astype(kind).tobytes()


@pytest.mark.parametrize("case", OUTSIDE)
def test_weights_in_other_files_are_found_wherever_they_stand(case, tmp_path):
    """What is read has none outside, whatever uses them; without their file there is an error."""
    model, what = OUTSIDE[case]
    path = models.save(model, tmp_path)
    with pytest.raises(OnnxError) as caught:
        bj.from_onnx(path)
    expected = f"model.onnx: {what}: its file 'weights.bin': No such file or directory"
    assert str(caught.value) == expected
    tensors = [tensor for _, tensor in content._external_tensors(onnx, model)]
    (tmp_path / "weights.bin").write_bytes(of_bytes(tensors[0]))
    message = content.read_message(path, 2**20)
    assert not list(content._external_tensors(onnx, message))
    assert message.ByteSize() > 0


def added(name="w", **entries):
    """A network `x + w` with `w` in another file."""
    model = network([node("Add", "x w")], [1, 3])
    tensor = outside(name)
    model.graph.initializer.append(tensor)
    del model.graph.initializer[0].external_data[:]
    for key, value in ({"location": "weights.bin"} | entries).items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    return model


def with_weights(tmp_path, data=None, **entries):
    data = np.float32([0, 1, 2, 3, 4]).tobytes() if data is None else data
    (tmp_path / "sub").mkdir(exist_ok=True)
    (tmp_path / "sub" / "weights.bin").write_bytes(data)
    (tmp_path / "weights.bin").write_bytes(data)
    return models.save(added(**entries), tmp_path)


PARTS = {
    "offset": ({"offset": "4", "length": "12"}, [1, 2, 3]),
    "rest": ({"offset": "8"}, [2, 3, 4]),
    "length": ({"length": "12", "checksum": "0"}, [0, 1, 2]),
    "folder": ({"location": "sub/weights.bin", "offset": "8", "length": "12"}, [2, 3, 4]),
}


@pytest.mark.parametrize("case", PARTS)
def test_weights_of_another_file(case, tmp_path):
    entries, expected = PARTS[case]
    path = with_weights(tmp_path, **entries)
    model = bj.from_onnx(path)
    np.testing.assert_array_equal(model.single(np.zeros(3, np.float32)), expected)
    x = f32(2, 3)
    np.testing.assert_array_equal(model(x), models.reference(path, x)[:, 0])
    # The whole counts: the file and its weights.
    with pytest.raises(OnnxError, match="the file and its weights need more than"):
        bj.from_onnx(path, max_bytes=path.stat().st_size + 11)


INSIDE = "expected a file inside the model's folder, got"
REFUSED = {
    "above": ({"location": "../weights.bin"}, INSIDE),
    "inside of above": ({"location": "sub/../../x/weights.bin"}, INSIDE),
    "backslash": ({"location": "..\\weights.bin"}, INSIDE),
    "absolute": ({"location": "/etc/passwd"}, INSIDE),
    "drive": ({"location": "C:weights.bin"}, INSIDE),
    "nul": ({"location": "a\0b"}, INSIDE),
    "link": ({"location": "link.bin"}, "which is a link to another folder"),
    "linked folder": ({"location": "out/secret.bin"}, "which is a link to another folder"),
    "folder": ({"location": "sub"}, "which is no regular file"),
    "pipe": ({"location": "pipe"}, "which is no regular file"),
    "none": ({"location": "absent.bin"}, "No such file"),
    "empty": ({"location": ""}, "which is no regular file"),
    "length": ({"length": "8"}, "expected 12 bytes in its file, got a length of 8"),
    "too short": ({"offset": "12", "length": "12"}, "expected 12 bytes in 'weights.bin', got 8"),
    "beyond": ({"offset": "99", "length": "12"}, "expected 12 bytes in 'weights.bin', got -79"),
    "too long": ({}, "expected 12 bytes in 'weights.bin', got 20"),
    "negative": ({"offset": "-4"}, "expected a number of bytes as offset, got '-4'"),
    "digits": ({"offset": "9" * 30}, "expected a number of bytes as offset, got '999"),
    "key": ({"basepath": "/etc"}, "expected the location of a file, perhaps an offset"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_places_of_weights_that_are_refused(case, tmp_path):
    entries, message = REFUSED[case]
    secret = tmp_path / "other"
    secret.mkdir()
    (secret / "secret.bin").write_bytes(bytes(12))
    folder = tmp_path / "model"
    folder.mkdir()
    os.symlink(secret / "secret.bin", folder / "link.bin")
    os.symlink(secret, folder / "out")
    os.mkfifo(folder / "pipe")
    path = with_weights(folder, **entries)
    with pytest.raises(OnnxError) as caught:
        bj.from_onnx(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith("model.onnx: initializer 'w'")
    assert "\n" not in str(caught.value)


def test_sizes_are_checked_before_weights_are_read(tmp_path):
    model = added(length=str(4 * 10**15))
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.append(10**15)
    (tmp_path / "weights.bin").write_bytes(bytes(12))
    with pytest.raises(OnnxError, match="the file and its weights need more than 2147483648"):
        bj.from_onnx(models.save(model, tmp_path))


def test_nothing_else_is_said_of_a_file_with_weights_elsewhere(tmp_path):
    """Unknown operators and a missing version are not mentioned."""
    model = with_unused("If", "", then_branch=branch(outside()))
    model.ClearField("opset_import")
    model.graph.node.append(node("Unheard", "x", "q"))
    with pytest.raises(OnnxError, match=r"its file 'weights\.bin'"):
        bj.from_onnx(models.save(model, tmp_path))


def test_onnxruntime_opens_no_other_files(tmp_path):
    """It gets what boundjax has read, even if the files have changed since."""
    path = with_weights(tmp_path, offset="8")
    seen = runtime.Network(path)
    np.testing.assert_array_equal(seen.evaluate(np.zeros(3, np.float32)), [2, 3, 4])
    with pytest.raises(OnnxError, match="expected a file inside the model's folder"):
        runtime.Network(models.save(added(location="/etc/passwd"), tmp_path))


# --- compressed files --------------------------------------------------------------------------


def test_compressed_files(tmp_path):
    plain = models.save(network([node("Add", "x w")], [1, 3], {"w": f32(3)}), tmp_path)
    path = tmp_path / "model.onnx.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    x = f32(2, 3)
    model = bj.from_onnx(path)
    np.testing.assert_array_equal(model(x), models.reference(plain, x)[:, 0])
    assert model.structure == bj.from_onnx(plain).structure
    np.testing.assert_array_equal(runtime.Network(path).evaluate(x[0]), model(x)[0])
    nodes, identity = check_onnx.read_onnx(path, check.append)
    assert len(nodes) == len(check_onnx.read_onnx(plain, check.append)[0])
    assert identity == ["onnx", hashlib.sha256(path.read_bytes()).hexdigest()]


DAMAGED = {
    "bomb": (gzip.compress(bytes(2**22)), "the decompressed file needs more than 1048576 bytes"),
    "truncated": (gzip.compress(f32(1000).tobytes())[:-9], "expected a gzip file, got a damaged"),
    "header": (b"\x1f\x8b", "expected a gzip file, got a damaged"),
    "crc": (gzip.compress(b"model")[:-8] + bytes(8), "expected a gzip file, got a damaged"),
    "body": (gzip.compress(b"model")[:10] + b"\xff" * 20, "expected a gzip file, got a damaged"),
    "other": (gzip.compress(b"not an ONNX file"), "expected an ONNX model"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_compressed_files(case, tmp_path, monkeypatch):
    data, message = DAMAGED[case]
    path = tmp_path / "model.onnx.gz"
    path.write_bytes(data)
    with pytest.raises(OnnxError, match=message) as caught:
        bj.from_onnx(path, max_bytes=2**20)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(check_onnx, "MAX_BYTES", 2**20)
    with pytest.raises(ValueError, match=r"^model\.onnx\.gz") as caught:
        check_onnx.read_onnx(path, check.append)
    assert "\n" not in str(caught.value)


def test_the_checker_reads_no_functions_and_no_other_domains(tmp_path):
    """A function may be called like an operator that the checker knows."""
    relu = helper.make_function(
        "mine", "Relu", ["a"], ["b"], [node("Neg", "a", "b")], [helper.make_operatorsetid("", 17)]
    )
    called = helper.make_node("Relu", ["x"], ["y"], domain="mine")
    model = network([called], [1, 3])
    model.opset_import.append(helper.make_operatorsetid("mine", 1))
    with pytest.raises(ValueError, match="'mine'"):
        check_onnx.read_onnx(models.save(model, tmp_path), check.append)
    model.functions.append(relu)
    path = models.save(model, tmp_path)
    np.testing.assert_array_equal(bj.from_onnx(path).single(f32(3)), -f32(3))
    with pytest.raises(ValueError, match="'mine'"):
        check_onnx.read_onnx(path, check.append)


# --- operator sets -----------------------------------------------------------------------------


def with_versions(*entries):
    model = network([node("Relu", "x")], [1, 3])
    model.ClearField("opset_import")
    for domain, version in entries:
        model.opset_import.add(domain=domain, version=version)
    return model


@pytest.mark.parametrize(
    "domains",
    [("", ""), ("", "ai.onnx"), ("ai.onnx", "ai.onnx"), ("ai.onnx", "ai.onnx.ml", "")],
)
def test_the_default_operator_set_may_be_listed_twice(domains, tmp_path):
    model = with_versions(*((domain, 1 if "ml" in domain else 13) for domain in domains))
    path = models.save(model, tmp_path)
    imported = bj.from_onnx(path)
    assert imported.opset == 13
    x = f32(1, 3)
    np.testing.assert_array_equal(imported(x), models.reference(path, x)[:, 0])


@pytest.mark.parametrize(
    ("entries", "got"),
    [
        ([("", 9), ("", 13)], r"\[9, 13\]"),
        ([("ai.onnx", 13), ("", 9), ("", 9)], r"\[9, 13\]"),
        ([("", 0), ("ai.onnx", 0)], r"\[0\]"),
        ([("other", 1)], r"\[\]"),
    ],
)
def test_two_versions_of_it_are_refused(entries, got, tmp_path):
    path = models.save(with_versions(*entries), tmp_path)
    message = f"model.onnx: expected one version of the default operator set, got {got}; export"
    with pytest.raises(OnnxError, match=message):
        bj.from_onnx(path)
