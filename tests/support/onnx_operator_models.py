"""Models of single ONNX operators with the boxes on which their bounds are tested."""

import numpy as np
from onnx import TensorProto
from onnx_models import IMAGE, f32, i64, network, node, scalar, single

INT64 = TensorProto.INT64
POSITIVE = (0.2, 0.7)
AROUND_0 = (-0.6, 0.9)


def scales(*values):
    return np.asarray(values, np.float32)


def on(box, **models):
    return {name: (model, box) for name, model in models.items()}


def resized(mode, *args, shape=(1, 2, 4, 5), opset=19, **attributes):
    return single("Resize", shape, *args, opset=opset, mode=mode, **attributes)


def unary(names, opset=20):
    return {name.lower(): single(name, [1, 9], opset=opset) for name in names.split()}


# Crops of the last two axes.
CROP = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 3.0}
ROI = scales(0, 0, -0.1, 0.2, 1, 1, 0.7, 1.2)

# name -> model and box.
MOVES = on(
    AROUND_0,
    pad_reflect=single("Pad", [1, 2, 4, 3], i64(0, 0, 3, 1, 0, 0, 2, 2), mode="reflect"),
    pad_reflect_axes=single("Pad", [1, 3, 4], i64(1, 2), None, i64(-1), mode="reflect", opset=18),
    pad_reflect_2=single("Pad", [1, 3], pads=[0, 2, 0, 1], mode="reflect", opset=2),
    pad_edge=single("Pad", [1, 2, 3], i64(0, 1, 4, 0, 0, 2), mode="edge"),
    pad_edge_crops=single("Pad", [1, 2, 5], i64(0, 1, -2, 0, 0, 2), mode="edge"),
    pad_wrap=single("Pad", [1, 2, 3], i64(0, 1, 2, 0, 5, 3), mode="wrap", opset=19),
    pad_constant=single("Pad", [1, 3, 4], i64(1, -1), scalar(0.5), i64(2), opset=18),
    depth_to_space=single("DepthToSpace", [1, 8, 3, 2], blocksize=2),
    depth_to_space_crd=single("DepthToSpace", [1, 18, 1, 2], blocksize=3, mode="CRD"),
    space_to_depth=single("SpaceToDepth", [1, 2, 4, 6], blocksize=2),
    gather_elements=single(
        "GatherElements", [1, 2, 4], np.asarray([[[0, -1, 2], [3, 3, 1]]]), axis=-1
    ),
    gather_nd=single("GatherND", [1, 2, 4], np.asarray([[0, 1], [0, -2]])),
    gather_nd_batch=single("GatherND", [1, 2, 4], np.asarray([[[1], [-1]]]), batch_dims=1),
    scatter_elements=single("ScatterElements", [1, 4], np.asarray([[2, -4]]), f32(1, 2), axis=1),
    scatter_9=single("Scatter", [1, 4], np.asarray([[2, 0]]), f32(1, 2), axis=1, opset=9),
    scatter_nd=single("ScatterND", [1, 4, 2], np.asarray([[0, 2], [0, 0]]), f32(2, 2)),
    scatter_of_inputs=network(
        [node("Neg", "x", "n"), node("ScatterElements", "c i n", axis=1)],
        [1, 3],
        {"c": f32(1, 5), "i": np.asarray([[4, 0, 1]])},
    ),
    cumsum=single("CumSum", [1, 2, 4], scalar(-1, np.int64)),
    cumsum_reverse=single("CumSum", [1, 2, 4], scalar(1, np.int64), exclusive=1, reverse=1),
    cumsum_exclusive=single("CumSum", [1, 4], scalar(1, np.int64), exclusive=1),
    tile=single("Tile", [1, 2, 3], i64(1, 3, 2)),
    trilu=single("Trilu", [1, 3, 4]),
    trilu_lower=single("Trilu", [1, 3, 4], scalar(-1, np.int64), upper=0),
    eye_like=network([node("EyeLike", "x", "e", k=1), node("Mul", "x e")], [2, 3]),
    eye_like_known=network(
        [node("EyeLike", "c", "e", dtype=1, k=-1), node("MatMul", "x e")],
        [1, 3],
        {"c": np.zeros((3, 4), np.int64)},
    ),
    compress=single("Compress", [1, 4], np.asarray([True, False, True]), axis=1),
    compress_flat=single("Compress", [1, 2, 2], np.asarray([False, True, True])),
    reverse_sequence=single("ReverseSequence", [3, 4, 2], i64(2, 0, 4), batch_axis=0, time_axis=1),
    reverse_sequence_time=single("ReverseSequence", [3, 2], i64(3, 2)),
    where_known=network(
        [node("Where", "c x v")],
        [1, 2, 3],
        {"c": np.asarray([[True], [False]]), "v": f32(3)},
    ),
    range_of_rounded=network(
        [node("Range", "a b c", "r"), node("Mul", "x r")],
        [1, 4],
        {"a": scalar(0.1), "b": scalar(0.9), "c": scalar(0.2)},
    ),
    top_1=network([node("TopK", "x k", "y i")], [1, 2, 4], {"k": i64(1)}),
    top_1_smallest=network(
        [node("TopK", "x k", "y i", axis=1, largest=0)], [1, 4, 2], {"k": i64(1)}
    ),
)
for reduction in ("add", "mul", "max", "min"):
    MOVES[f"scatter_{reduction}"] = (
        single(
            "ScatterElements",
            [1, 4],
            np.asarray([[2, 0, 2]]),
            f32(1, 3),
            axis=1,
            reduction=reduction,
            opset=18,
        ),
        AROUND_0,
    )
    MOVES[f"scatter_nd_{reduction}"] = (
        single(
            "ScatterND",
            [1, 3, 2],
            np.asarray([[0, 2], [0, 0]]),
            f32(2, 2),
            reduction=reduction,
            opset=18,
        ),
        AROUND_0,
    )

RESIZES = on(
    POSITIVE,
    nearest_half=resized("nearest", None, scales(1, 1, 1.5, 0.5)),
    nearest_ceil=resized("nearest", None, scales(1, 1, 2, 0.6), nearest_mode="ceil"),
    nearest_corners=resized(
        "nearest",
        None,
        None,
        i64(1, 2, 7, 3),
        nearest_mode="round_prefer_ceil",
        coordinate_transformation_mode="align_corners",
    ),
    nearest_crop=resized("nearest", ROI, None, i64(1, 2, 6, 3), **CROP),
    nearest_tf=resized(
        "nearest",
        scales(),
        scales(1, 1, 2, 3),
        opset=11,
        nearest_mode="floor",
        coordinate_transformation_mode="tf_half_pixel_for_nn",
    ),
    linear=resized("linear", None, scales(1, 1, 2, 1.3), opset=13),
    linear_sizes=resized(
        "linear",
        None,
        None,
        i64(7, 3),
        coordinate_transformation_mode="pytorch_half_pixel",
        axes=[2, 3],
    ),
    linear_corners=resized(
        "linear", None, scales(1, 1, 3, 2), coordinate_transformation_mode="align_corners"
    ),
    linear_symmetric=resized(
        "linear",
        None,
        scales(1, 1, 1.3, 0.7),
        coordinate_transformation_mode="half_pixel_symmetric",
    ),
    linear_crop=resized("linear", ROI, None, i64(1, 2, 6, 3), **CROP),
    linear_1d=resized("linear", None, scales(1, 1, 1.7), shape=(1, 2, 4)),
    linear_3d=resized("linear", None, scales(1, 1, 2, 1.5, 0.5), shape=(1, 1, 3, 2, 4)),
    linear_10=single("Resize", [1, 2, 4, 5], scales(1, 1, 1.5, 2), mode="linear", opset=10),
    cubic=resized("cubic", None, scales(1, 1, 1.3, 2)),
    cubic_excludes=resized(
        "cubic", None, None, i64(1, 2, 3, 7), cubic_coeff_a=-0.5, exclude_outside=1
    ),
    cubic_corners=resized(
        "cubic", None, scales(1, 1, 2, 2), coordinate_transformation_mode="align_corners"
    ),
    cubic_of_one=resized("cubic", None, scales(1, 1, 3, 2), shape=(1, 1, 1, 2)),
    not_larger=resized(
        "linear", None, None, i64(9, 7), axes=[2, 3], keep_aspect_ratio_policy="not_larger"
    ),
    not_smaller=resized(
        "nearest", None, None, i64(9, 7), axes=[2, 3], keep_aspect_ratio_policy="not_smaller"
    ),
    upsample_linear=single("Upsample", [1, 2, 3, 4], scales(1, 1, 2, 1.5), mode="linear", opset=9),
    upsample_7=single("Upsample", [1, 2, 3, 4], scales=[1.0, 1.0, 2.0, 3.0], opset=7),
)

NORMS = on(
    POSITIVE,
    layer_norm=single("LayerNormalization", [1, 3, 6], f32(6), f32(6)),
    layer_norm_axis=single("LayerNormalization", [1, 3, 4], f32(3, 4), axis=1, epsilon=0.01),
    instance_norm=single("InstanceNormalization", [1, 3, 4, 2], f32(3), f32(3)),
    instance_norm_1d=single("InstanceNormalization", [1, 2, 5], f32(2), f32(2), epsilon=0.1),
    group_norm_18=single(
        "GroupNormalization", [1, 4, 3, 2], f32(2), f32(2), num_groups=2, opset=18
    ),
    group_norm_21=single(
        "GroupNormalization", [1, 4, 3, 2], f32(4), f32(4), num_groups=2, opset=21
    ),
    rms_norm=single("RMSNormalization", [1, 3, 4], f32(4), opset=23),
    rms_norm_axis=single("RMSNormalization", [1, 3, 4], f32(3, 4), axis=1, opset=23),
    simplified_norm=single("SimplifiedLayerNormalization", [1, 3, 4], f32(4)),
    l1_norm=single("LpNormalization", [1, 3, 4], p=1, axis=1),
    l2_norm=single("LpNormalization", [1, 3, 4]),
    moments=single("MeanVarianceNormalization", [1, 2, 3, 4], axes=[2, 3]),
    lrn=single("LRN", [1, 5, 2, 3], size=3, alpha=0.3, beta=0.75, bias=1.1),
    lrn_1=single("LRN", [1, 5, 4, 1], size=1, alpha=0.3, beta=0.5),
)

REDUCTIONS = on(
    POSITIVE,
    reduce_l1=single("ReduceL1", IMAGE, axes=[1, -1]),
    reduce_l1_18=single("ReduceL1", IMAGE, i64(1), keepdims=0, opset=18),
    reduce_l2=single("ReduceL2", [1, 4], axes=[1], keepdims=0),
    reduce_l2_18=single("ReduceL2", [1, 3, 4], i64(-1), opset=18),
    reduce_l2_all=single("ReduceL2", [1, 3, 4], keepdims=0),
    reduce_l2_none=single("ReduceL2", [1, 3], i64(), noop_with_empty_axes=1, opset=18),
    reduce_sum_square=single("ReduceSumSquare", [1, 3, 4], axes=[2]),
    reduce_log_sum=single("ReduceLogSum", [1, 3, 4], axes=[2]),
    reduce_log_sum_exp=single("ReduceLogSumExp", [1, 3, 4], axes=[-1], keepdims=0),
    reduce_log_sum_exp_18=single("ReduceLogSumExp", [1, 3, 4], i64(1, 2), opset=18),
    reduce_max_18=single("ReduceMax", [1, 3, 4], i64(1), opset=18, keepdims=0),
    reduce_min_18=single("ReduceMin", [1, 3, 4], i64(), noop_with_empty_axes=1, opset=18),
    reduce_mean_empty=single("ReduceMean", [1, 3, 4], i64(), opset=18),
    mean=network([node("Mean", "x w v")], [1, 3], {"w": f32(3), "v": f32(2, 1)}),
    mean_of_one=single("Mean", [1, 3]),
)
REDUCTIONS |= on(
    AROUND_0,
    argmin=single("ArgMin", [1, 5], axis=1, output=INT64),
    argmin_last=single("ArgMin", [1, 5], axis=1, select_last_index=1, keepdims=0, output=INT64),
    argmax_last=single("ArgMax", [1, 5], axis=1, select_last_index=1, output=INT64),
)

POWERS = on(
    AROUND_0,
    pow_int64=single("Pow", [1, 6], scalar(2, np.int64)),
    pow_int32=single("Pow", [1, 6], np.asarray([3], np.int32)),
    pow_1=single("Pow", [1, 6], scalar(1.0)),
    pow_0=single("Pow", [1, 6], scalar(0, np.int64)),
    pow_many=single("Pow", [1, 3], np.float32([1, 2, 5])),
    pow_broadcast=single("Pow", [1, 3], np.full((2, 3), 2, np.int64)),
    pow_of_integers=network(
        [node("Cast", "x", "i", to=INT64), node("Pow", "i k", "p"), node("Cast", "p", to=1)],
        [1, 3],
        {"k": scalar(3, np.int64)},
    ),
    pow_of_known=network(
        [
            node("Size", "x", "s"),
            node("Pow", "s k", "p"),
            node("Cast", "p", "f", to=1),
            node("Mul", "x f"),
        ],
        [1, 3],
        {"k": scalar(2, np.int64)},
    ),
) | on(
    POSITIVE,
    pow_half=single("Pow", [1, 6], scalar(0.5)),
    pow_negative=single("Pow", [1, 6], scalar(-2, np.int64)),
    pow_fraction=single("Pow", [1, 6], scalar(-1.7)),
    pow_fractions=single("Pow", [1, 3], np.float32([0.5, 2, 1.5])),
    pow_base=network([node("Pow", "w x")], [1, 3], {"w": np.abs(f32(3))}),
    pow_both=network([node("Neg", "x", "n"), node("Pow", "x n")], [1, 3]),
)

ELEMENTWISE = (
    on(AROUND_0, **unary("Asinh Cosh Sinh Celu Mish HardSwish Selu Shrink ThresholdedRelu"))
    | on((1.2, 1.9), acosh=single("Acosh", [1, 3]))
    | on((-0.5, 0.6), **unary("Acos Asin Atanh Tan"))
    | on(
        AROUND_0,
        celu_alpha=single("Celu", [1, 9], alpha=0.4),
        shrink_soft=single("Shrink", [1, 9], lambd=0.3, bias=0.3),
        shrink_hard=single("Shrink", [1, 9], lambd=0.3, bias=0.1),
        thresholded=single("ThresholdedRelu", [1, 9], alpha=0.3),
        thresholded_negative=single("ThresholdedRelu", [1, 9], alpha=-0.2),
        thresholded_0=single("ThresholdedRelu", [1, 9], alpha=0.0),
        swish=single("Swish", [1, 9], alpha=1.5, opset=24),
        swish_1=single("Swish", [1, 9], opset=24),
        xor=network(
            [
                node("Less", "x w", "a"),
                node("Greater", "x v", "b"),
                node("Xor", "a b", "c"),
                node("Cast", "c", to=1),
            ],
            [1, 9],
            {"w": f32(9), "v": scalar(0.1)},
        ),
        mod_float=single("Mod", [1, 9], scalar(0.4), fmod=1),
        mod_integers=network(
            [
                node("Mul", "x ten", "t"),
                node("Cast", "t", "i", to=INT64),
                node("Mod", "i three", "m"),
                node("Cast", "m", to=1),
            ],
            [1, 9],
            {"ten": scalar(10.0), "three": scalar(3, np.int64)},
        ),
        mod_known=network(
            [
                node("Mod", "a b", "m"),
                node("Cast", "m", "f", to=1),
                node("Mul", "x f"),
            ],
            [1, 3],
            {"a": i64(-7, 7, 5), "b": i64(3, -3, 2)},
        ),
    )
)


def transposed(size, **attributes):
    return single("ConvTranspose", [1, 2, 4, 3], f32(2, 3, *size), **attributes)


CONVOLUTIONS = on(
    AROUND_0,
    transposed_same_upper=transposed([3, 2], auto_pad="SAME_UPPER", strides=[2, 2]),
    transposed_same_lower=transposed([4, 3], auto_pad="SAME_LOWER", strides=[1, 2]),
    transposed_same_dilated=transposed([3, 2], auto_pad="SAME_UPPER", dilations=[2, 1]),
    transposed_valid=transposed([3, 2], auto_pad="VALID", strides=[2, 1]),
    transposed_output=transposed([3, 4], output_shape=[8, 7], strides=[2, 2]),
    transposed_output_same=transposed(
        [3, 4], output_shape=[8, 7], strides=[2, 2], auto_pad="SAME_UPPER", output_padding=[1, 0]
    ),
    transposed_output_lower=transposed(
        [3, 4], output_shape=[8, 7], strides=[2, 2], auto_pad="SAME_LOWER"
    ),
    transposed_1d=single(
        "ConvTranspose",
        [1, 4, 5],
        f32(4, 2, 3),
        f32(4),
        group=2,
        auto_pad="SAME_LOWER",
        strides=[2],
        output_padding=[1],
    ),
    conv_1d_same=single("Conv", [1, 2, 6], f32(4, 1, 4), group=2, auto_pad="SAME_UPPER"),
    conv_3d_same=single(
        "Conv", [1, 1, 3, 4, 2], f32(2, 1, 2, 3, 2), auto_pad="SAME_LOWER", strides=[2, 1, 1]
    ),
)
OPERATORS = MOVES | RESIZES | NORMS | REDUCTIONS | POWERS | ELEMENTWISE | CONVOLUTIONS
