"""ONNX files with weights in other files, and versions of operator sets."""

import numpy as np
import pytest

import boundjax as bj
from boundjax.onnx import OnnxError
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


@pytest.mark.parametrize("case", OUTSIDE)
def test_weights_in_other_files_are_refused_wherever_they_stand(case, tmp_path):
    model, what = OUTSIDE[case]
    path = models.save(model, tmp_path)
    with pytest.raises(OnnxError) as caught:
        bj.from_onnx(path)
    expected = f"model.onnx: {what} is stored outside the file; save the model as one file"
    assert str(caught.value) == expected


def test_nothing_else_is_said_of_a_file_with_weights_elsewhere(tmp_path):
    """Unknown operators and a missing version are not mentioned."""
    model = with_unused("If", "", then_branch=branch(outside()))
    model.ClearField("opset_import")
    model.graph.node.append(node("Unheard", "x", "q"))
    with pytest.raises(OnnxError, match="save the model as one file"):
        bj.from_onnx(models.save(model, tmp_path))


def test_onnxruntime_is_not_given_such_a_file(tmp_path, monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(runtime, "_session", refuse)
    path = models.save(OUTSIDE["graph"][0], tmp_path)
    with pytest.raises(OnnxError, match="is stored outside the file"):
        runtime.Network(path)


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
