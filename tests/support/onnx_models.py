"""Small ONNX models for test_onnx.py: built with onnx.helper, run with onnxruntime.

``CASES`` has every operator that boundjax reads, in the variants of its opsets.
"""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

# Warnings about unusual files are what the tests are made of.
onnxruntime.set_default_logger_severity(4)


def i64(*values):
    return np.asarray(values, np.int64)


def f32(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scalar(value, dtype=np.float32):
    return np.asarray(value, dtype)


def node(operator, inputs, outputs="y", name="", **attributes):
    """A node whose operands and outputs are names between spaces; `_` is one left out."""
    operands = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(operator, operands, outputs.split(), name=name, **attributes)


def network(nodes, shape, constants=None, opset=17, output=TensorProto.FLOAT):
    """A model from `x` of the given shape to `y`."""
    initializers = [
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in (constants or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", output, None)],
        initializers,
    )
    return helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_operatorsetid("", opset)]
    )


def single(operator, shape, *constants, opset=17, output=TensorProto.FLOAT, **attributes):
    """A model of one node; None is an operand left out."""
    names = ["_" if value is None else f"c{k}" for k, value in enumerate(constants)]
    known = {f"c{k}": value for k, value in enumerate(constants) if value is not None}
    first = node(operator, " ".join(["x", *names]), name="tested", **attributes)
    return network([first], shape, known, opset, output)


def save(model, folder):
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def reference(path, examples):
    """onnxruntime's outputs, example by example, as float32 without the batch dimension."""
    options = onnxruntime.SessionOptions()
    # Or it replaces products with dequantized weights by ones of 8-bit numbers.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in source.shape]
    return np.stack(
        [session.run(None, {source.name: x.reshape(shape)})[0].astype(np.float32) for x in examples]
    )


IMAGE = [1, 4, 7, 6]
# name -> model. Operands that are constants are initializers.
CASES = {
    # Convolutions.
    "conv": single("Conv", IMAGE, f32(6, 4, 3, 2), f32(6)),
    "conv_no_bias": single("Conv", IMAGE, f32(6, 4, 3, 2), kernel_shape=[3, 2]),
    "conv_strides_pads": single(
        "Conv", IMAGE, f32(6, 4, 3, 3), f32(6), strides=[2, 1], pads=[1, 0, 2, 1]
    ),
    "conv_groups": single("Conv", IMAGE, f32(6, 2, 3, 3), f32(6), group=2, pads=[1, 1, 1, 1]),
    "conv_depthwise": single("Conv", IMAGE, f32(4, 1, 3, 3), group=4),
    "conv_dilations": single("Conv", IMAGE, f32(2, 4, 3, 3), dilations=[2, 1], pads=[2, 0, 0, 1]),
    "conv_same_upper": single("Conv", IMAGE, f32(2, 4, 2, 4), auto_pad="SAME_UPPER"),
    "conv_same_lower": single(
        "Conv", IMAGE, f32(2, 4, 2, 3), auto_pad="SAME_LOWER", strides=[2, 2]
    ),
    "conv_valid": single("Conv", IMAGE, f32(2, 4, 3, 3), auto_pad="VALID"),
    "conv_1d": single("Conv", [1, 3, 9], f32(2, 3, 4), f32(2), strides=[2]),
    "conv_3d": single("Conv", [1, 2, 4, 4, 4], f32(2, 2, 2, 2, 2)),
    "transposed": single("ConvTranspose", IMAGE, f32(4, 3, 3, 3), f32(3)),
    "transposed_strides": single(
        "ConvTranspose",
        IMAGE,
        f32(4, 3, 4, 3),
        strides=[2, 3],
        pads=[1, 0, 0, 2],
        output_padding=[1, 2],
    ),
    "transposed_groups": single(
        "ConvTranspose", IMAGE, f32(4, 3, 3, 2), group=2, dilations=[2, 1], strides=[2, 2]
    ),
    # Pads larger than the window: crops of the result.
    "transposed_crops": single(
        "ConvTranspose", IMAGE, f32(4, 2, 2, 2), strides=[2, 2], pads=[2, 0, 2, 3]
    ),
    # Pooling.
    "max_pool": single("MaxPool", IMAGE, kernel_shape=[2, 3], strides=[2, 1]),
    "max_pool_pads": single(
        "MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 2], ceil_mode=1
    ),
    "max_pool_dilations": single("MaxPool", IMAGE, kernel_shape=[2, 2], dilations=[3, 2]),
    "average_pool": single("AveragePool", IMAGE, kernel_shape=[2, 3]),
    "average_pool_pads": single(
        "AveragePool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 2]
    ),
    "average_pool_include": single(
        "AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 0, 1, 2], count_include_pad=1
    ),
    "average_pool_ceil": single(
        "AveragePool", IMAGE, kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1, opset=19
    ),
    "average_pool_ceil_include": single(
        "AveragePool",
        IMAGE,
        kernel_shape=[3, 3],
        strides=[3, 2],
        pads=[1, 1, 1, 1],
        ceil_mode=1,
        count_include_pad=1,
        opset=19,
    ),
    "average_pool_same": single(
        "AveragePool", IMAGE, kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER"
    ),
    "global_average": single("GlobalAveragePool", IMAGE),
    "global_max": single("GlobalMaxPool", IMAGE),
    # Products.
    "gemm": single("Gemm", [1, 5], f32(5, 3), f32(3)),
    "gemm_no_c": single("Gemm", [1, 5], f32(5, 3)),
    "gemm_scaled": single("Gemm", [1, 5], f32(3, 5), f32(1, 3), transB=1, alpha=0.5, beta=2.0),
    "gemm_transposed": single("Gemm", [5, 2], f32(5, 3), scalar(2.0), transA=1),
    "gemm_column": single("Gemm", [4, 5], f32(5, 3), f32(4, 1)),
    "matmul": single("MatMul", [1, 4, 5], f32(5, 3)),
    "matmul_vector": single("MatMul", [5], f32(5)),
    "matmul_stack": single("MatMul", [1, 3, 4, 5], f32(3, 5, 2)),
    "matmul_left": network([node("MatMul", "w x")], [1, 5, 2], {"w": f32(3, 5)}),
    "attention": network(
        [node("Transpose", "x", "t", perm=[0, 2, 1]), node("MatMul", "x t")], [1, 3, 4]
    ),
    "batch_norm": single("BatchNormalization", IMAGE, *f32(3, 4), np.abs(f32(4)), epsilon=0.1),
    "batch_norm_7": single(
        "BatchNormalization", [1, 4], *f32(3, 4), np.abs(f32(4)), momentum=0.5, opset=7
    ),
    "softmax": single("Softmax", [1, 3, 4]),
    "softmax_axis": single("Softmax", [1, 3, 4], axis=1),
    "softmax_11_flattens": single("Softmax", [1, 3, 4], opset=11),
    "softmax_11_last": single("Softmax", [1, 3, 4], axis=2, opset=11),
    "log_softmax": single("LogSoftmax", [1, 3, 4], axis=-2),
    # Shapes.
    "reshape_infer": single("Reshape", IMAGE, i64(0, -1)),
    "reshape_zero": single("Reshape", [1, 4, 6], i64(0, 0, 2, 3)),
    "flatten": single("Flatten", IMAGE),
    "flatten_negative": single("Flatten", IMAGE, axis=-1),
    "flatten_0": single("Flatten", IMAGE, axis=0),
    "squeeze_11": single("Squeeze", [1, 3, 1, 2], axes=[2], opset=11),
    "squeeze_13": single("Squeeze", [1, 3, 1, 2], i64(-2)),
    "squeeze_all": single("Squeeze", [1, 3, 1, 2]),
    "unsqueeze_11": single("Unsqueeze", [1, 3], axes=[1, 3], opset=11),
    "unsqueeze_13": single("Unsqueeze", [1, 3], i64(-1, 0)),
    "transpose": single("Transpose", [1, 2, 3]),
    "transpose_perm": single("Transpose", [1, 2, 3], perm=[0, 2, 1]),
    "concat": network([node("Concat", "x w x", axis=-1)], [1, 3], {"w": f32(1, 2)}),
    "slice_9": single("Slice", IMAGE, starts=[1, -3], ends=[-1, 99], axes=[1, 2], opset=9),
    "slice_13": single("Slice", IMAGE, i64(0, 5), i64(9, -99), i64(-2, 3), i64(2, -2)),
    "slice_before": single("Slice", IMAGE, i64(-9), i64(-99), i64(2), i64(-1)),
    "slice_empty": single("Slice", [1, 3], i64(2), i64(1), i64(1)),
    "gather": single("Gather", IMAGE, i64([0, -1], [2, 2]), axis=2),
    "gather_scalar": single("Gather", IMAGE, scalar(-1, np.int64), axis=1),
    "pad": single("Pad", [1, 3, 4], i64(0, 1, 2, 0, 0, 1), scalar(0.5)),
    "pad_crops": single("Pad", [1, 3, 4], i64(0, -1, 2, 0, 1, -2)),
    "pad_10": single("Pad", [1, 3], pads=[0, 1, 0, 2], value=2.0, opset=10),
    "pad_axes": single("Pad", [1, 3, 4], i64(1, 2), None, i64(-1), opset=18),
    "expand": single("Expand", [1, 3, 1], i64(2, 1, 1, 4)),
    "tile": single("Tile", [1, 3], i64(1, 2)),
    "upsample": single("Upsample", IMAGE, np.float32([1, 1, 2, 3]), opset=9, mode="nearest"),
    "resize_10": single("Resize", IMAGE, np.float32([1, 1, 3, 1]), opset=10),
    "resize_half": single("Resize", IMAGE, None, np.float32([1, 1, 3, 2])),
    "resize_sizes": single(
        "Resize",
        IMAGE,
        None,
        None,
        i64(1, 4, 14, 24),
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    "split_13": network(
        [node("Split", "x l", "a b", axis=1), node("Concat", "b a", axis=1)],
        [1, 5],
        {"l": i64(2, 3)},
    ),
    "split_11": network(
        [node("Split", "x", "a b", axis=1, split=[4, 1]), node("Mul", "a b")], [1, 5], opset=11
    ),
    "split_equal": network([node("Split", "x", "a b", axis=1), node("Sub", "a b")], [1, 6]),
    "split_18": network(
        [node("Split", "x", "a b", axis=1, num_outputs=2), node("Concat", "b a", axis=1)],
        [1, 5],
        opset=18,
    ),
    # Elementwise.
    "add": single("Add", IMAGE, f32(6)),
    "add_larger": single("Add", [1, 3], f32(2, 4, 3)),
    "sub_left": network([node("Sub", "w x")], [1, 3], {"w": f32(3)}),
    "mul": single("Mul", [1, 3], scalar(3.0)),
    "div": single("Div", IMAGE, 1 + np.abs(f32(4, 1, 1))),
    "pow": single("Pow", [1, 3], scalar(3.0)),
    "pow_base": network([node("Pow", "w x")], [1, 3], {"w": np.abs(f32(3))}),
    "sum": network([node("Sum", "x w x")], [1, 3], {"w": f32(3)}),
    "max": network([node("Max", "x w v")], [1, 3], {"w": f32(3), "v": f32(1)}),
    "min": network([node("Min", "x w")], [1, 3], {"w": f32(3)}),
    "clip_6": single("Clip", [1, 9], min=-0.5, max=0.5, opset=6),
    "clip_6_max": single("Clip", [1, 9], max=0.5, opset=6),
    "clip_11": single("Clip", [1, 9], scalar(-0.5), scalar(0.25), opset=11),
    "clip_min": single("Clip", [1, 9], scalar(-0.5)),
    "clip_max": single("Clip", [1, 9], None, scalar(0.25)),
    "leaky_relu": single("LeakyRelu", [1, 9], alpha=0.2),
    "leaky_relu_default": single("LeakyRelu", [1, 9]),
    "elu": single("Elu", [1, 9], alpha=0.7),
    "selu": single("Selu", [1, 9]),
    "prelu": single("PRelu", IMAGE, f32(4, 1, 1)),
    "hard_sigmoid": single("HardSigmoid", [1, 9], alpha=0.6),
    "gelu": single("Gelu", [1, 9], opset=20),
    "gelu_tanh": single("Gelu", [1, 9], approximate="tanh", opset=20),
    "mish": single("Mish", [1, 9], opset=18),
    "dropout": single("Dropout", [1, 9], opset=10, ratio=0.3),
    "dropout_12": single("Dropout", [1, 9], scalar(0.3), scalar(False, np.bool_)),
    "cast": single("Cast", [1, 9], output=TensorProto.INT64, to=TensorProto.INT64),
    "log": network([node("Exp", "x", "e"), node("Log", "e")], [1, 3]),
    "sqrt": network([node("Abs", "x", "a"), node("Sqrt", "a")], [1, 3]),
    "reciprocal": network([node("Exp", "x", "e"), node("Reciprocal", "e")], [1, 3]),
    # Reductions.
    "reduce_mean": single("ReduceMean", IMAGE, axes=[2, -1]),
    "reduce_mean_18": single("ReduceMean", IMAGE, i64(1), keepdims=0, opset=18),
    "reduce_sum_11": single("ReduceSum", IMAGE, axes=[1], keepdims=0, opset=11),
    "reduce_sum_13": single("ReduceSum", IMAGE, i64(1, 3)),
    "reduce_sum_all": single("ReduceSum", IMAGE, keepdims=0),
    "reduce_sum_none": single("ReduceSum", IMAGE, noop_with_empty_axes=1),
    "reduce_max": single("ReduceMax", IMAGE, axes=[-1]),
    "reduce_min": single("ReduceMin", IMAGE, axes=[1], keepdims=0),
    "reduce_prod": single("ReduceProd", [1, 3], axes=[1]),
    "argmax": single("ArgMax", [1, 5], axis=1, output=TensorProto.INT64),
    "argmax_flat": single("ArgMax", IMAGE, axis=1, keepdims=0, output=TensorProto.INT64),
    # Predicates and counts.
    "where": network(
        [node("Greater", "x w", "p"), node("Where", "p x v")], [1, 5], {"w": f32(5), "v": f32(1)}
    ),
    "predicates": network(
        [
            node("Less", "x w", "a"),
            node("GreaterOrEqual", "x v", "b"),
            node("LessOrEqual", "x v", "c"),
            node("And", "a b", "d"),
            node("Not", "c", "e"),
            node("Or", "d e", "f"),
            node("Cast", "f", to=TensorProto.FLOAT),
        ],
        [1, 9],
        {"w": f32(9), "v": scalar(0.1)},
    ),
    "one_hot_count": network(
        [
            node("ArgMax", "x", "k", axis=1, keepdims=0),
            node("OneHot", "k depth values", "h", axis=1),
            node("Equal", "h one", "e"),
            node("Cast", "e", "c", to=TensorProto.INT64),
            node("ReduceSum", "c axes", keepdims=0),
        ],
        [1, 3, 6],
        {"depth": i64(3), "values": i64(0, 1), "one": i64(1), "axes": i64(0, 2)},
        output=TensorProto.INT64,
    ),
    # Known values.
    "flatten_by_shape": network(
        [
            node("Shape", "x", "s"),
            node("Gather", "s zero", "b"),
            node("Unsqueeze", "b axes", "u"),
            node("Concat", "u rest", "target", axis=0),
            node("Reshape", "x target"),
        ],
        IMAGE,
        {"zero": scalar(0, np.int64), "axes": i64(0), "rest": i64(-1)},
    ),
    "expand_by_shape": network(
        [
            node("Shape", "x", "s", start=1),
            node("ConstantOfShape", "one", "ones", value=numpy_helper.from_array(i64(2))),
            node("Equal", "ones two", "p"),
            node("Where", "p s ones", "target"),
            node("Constant", "", "c", value_floats=[1.5]),
            node("Expand", "c target", "e"),
            node("Add", "x e"),
        ],
        [1, 3],
        {"one": i64(1), "two": i64(2)},
    ),
    "positions": network(
        [
            node("Size", "x", "n"),
            node("Div", "n two", "half"),
            node("Range", "zero half one", "r"),
            node("Neg", "r", "m"),
            node("Sub", "m one", "i"),
            node("Gather", "x i", axis=1),
        ],
        [1, 7],
        {"two": scalar(2, np.int64), "zero": scalar(0, np.int64), "one": scalar(1, np.int64)},
    ),
    "scaled_by_size": network(
        [
            node("Shape", "x", "s"),
            node("Slice", "s a b", "w"),
            node("Cast", "w", "f", to=TensorProto.FLOAT),
            node("Sqrt", "f", "q"),
            node("Div", "x q", "d"),
            node("ConstantOfShape", "s", "z"),
            node("Sub", "d z"),
        ],
        [1, 7],
        {"a": i64(1), "b": i64(2)},
    ),
    "range_of_floats": network(
        [
            node("Range", "a b c", "r"),
            node("Mul", "x r"),
        ],
        [1, 4],
        {"a": scalar(1.0), "b": scalar(-0.9), "c": scalar(-0.5)},
    ),
    "constant_output": network(
        [node("Shape", "x", "s"), node("Cast", "s", to=TensorProto.FLOAT)], [1, 4]
    ),
}
UNARY = (
    "Abs Atan Ceil Cos Erf Exp Floor HardSwish Identity Neg Relu Round Sigmoid Sign Sin Softplus "
    "Softsign Tanh"
)
CASES.update({name: single(name, [1, 9]) for name in UNARY.split()})
