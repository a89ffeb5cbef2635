"""ONNX models of control flow, local functions, recurrent layers and weights of other types."""

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_models import f32, i64, network, node, scalar

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
DOUBLE, HALF = TensorProto.DOUBLE, TensorProto.FLOAT16


def value(name, kind=FLOAT, shape=None):
    return helper.make_tensor_value_info(name, kind, shape)


def graph(nodes, inputs="", outputs="", constants=None):
    """A graph inside a node; names between spaces, `name:7` is one of another element type."""

    def values(names):
        pairs = (name.partition(":") for name in names.split())
        # onnxruntime wants to know that step numbers and conditions are single numbers.
        return [
            value(name, int(kind), []) if kind else value(name, FLOAT) for name, _, kind in pairs
        ]

    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    return helper.make_graph(nodes, "inner", values(inputs), values(outputs), initializers)


# --- control flow ------------------------------------------------------------------------------

TRUE, FALSE = np.array(True), np.array(False)
RELU = graph([node("Relu", "x", "t")], outputs="t")
NEGATIVE = graph([node("Neg", "x", "e")], outputs="e")


def branch(condition, **changes):
    graphs = {"then_branch": RELU, "else_branch": NEGATIVE} | changes
    return network([node("If", "c", "y", **graphs)], [1, 6], {"c": condition})


# `v -> relu(v w) + step`, which also gives `v`.
STEP = [
    node("MatMul", "v w", "p"),
    node("Relu", "p", "r"),
    node("Cast", "i", "n", to=FLOAT),
    node("Add", "r n", "u"),
    node("Identity", "c", "d"),
    node("Identity", "v", "s"),
]
W = 0.6 * f32(3, 3)


def loop(nodes=STEP, count=4, names="m true x", outputs="last all", after=(), **constants):
    body = graph(nodes, f"i:{INT64} c:{BOOL} v", f"d:{BOOL} u s", constants.pop("inner", None))
    initializers = {"m": scalar(count, np.int64), "true": TRUE, "w": W} | constants
    return network(
        [node("Loop", names, outputs, name="loop", body=body), *after], [1, 3], initializers
    )


SUM = [node("ReduceSum", "all axes", "a", keepdims=0), node("Add", "last a")]
# The loop ends when the step is 2.
UNTIL = [
    *STEP[:4],
    node("Identity", "v", "s"),
    node("Less", "i two", "d"),
]


def nested():
    inner = graph(STEP[:5], f"i:{INT64} c:{BOOL} v", f"d:{BOOL} u")
    nodes = [
        node("Add", "j two", "k"),  # trip counts of 2 and 3
        node("Loop", "k true a", "b", body=inner),
        node("Identity", "c2", "d2"),
        node("Concat", "a b", "z", axis=1),
    ]
    outer = graph(nodes, f"j:{INT64} c2:{BOOL} a", f"d2:{BOOL} b z")
    initializers = {"m": scalar(2, np.int64), "true": TRUE, "w": W, "two": scalar(2, np.int64)}
    nodes = [
        node("Loop", "m true x", "last all", body=outer),
        node("ReduceMax", "all", axes=[0], keepdims=0),
    ]
    return network(nodes, [1, 3], initializers)


def branches_in_a_loop():
    """Even steps negate, odd ones take the sine; both take a weight from outside."""
    branches = {
        "then_branch": graph([node("Mul", "v w1", "n")], outputs="n"),
        "else_branch": graph([node("Sin", "v", "q")], outputs="q"),
    }
    nodes = [
        node("Div", "i two", "half"),
        node("Mul", "half two", "twice"),
        node("Equal", "i twice", "even"),
        node("If", "even", "u", **branches),
        node("Identity", "c", "d"),
        node("Identity", "u", "s"),
    ]
    initializers = {"two": scalar(2, np.int64), "w1": f32(3, seed=4)}
    return loop(nodes, 3, "m true x", "last all", SUM, axes=i64(0), **initializers)


def scan(**attributes):
    nodes = [
        node("MatMul", "h w", "p"),
        node("Add", "p e", "q"),
        node("Tanh", "q", "g"),
        node("Neg", "g", "o"),
    ]
    body = graph(nodes, "h e", "g o")
    scanned = node("Scan", "h0 x", "last all", body=body, num_scan_inputs=1, **attributes)
    after = [node("Add", "last all")]
    return network([scanned, *after], [4, 3], {"h0": f32(3), "w": W})


# --- local functions ---------------------------------------------------------------------------


def function(name, inputs, outputs, nodes, attributes=(), defaults=(), domain="mine"):
    imports = [helper.make_operatorsetid("", 17), helper.make_operatorsetid("mine", 1)]
    return helper.make_function(
        domain,
        name,
        inputs.split(),
        outputs.split(),
        nodes,
        imports,
        list(attributes),
        list(defaults),
    )


def call(name, inputs, outputs="y", **attributes):
    return helper.make_node(name, inputs.split(), outputs.split(), domain="mine", **attributes)


def referring(operator, inputs, outputs, **references):
    """A node whose attributes are those of the function: name=(name there, type)."""
    made = node(operator, inputs, outputs)
    for name, (of, kind) in references.items():
        made.attribute.add(name=name, ref_attr_name=of, type=kind)
    return made


def with_functions(nodes, functions, shape=(1, 3), constants=None):
    model = network(nodes, list(shape), constants)
    model.opset_import.append(helper.make_operatorsetid("mine", 1))
    model.functions.extend(functions)
    return model


LEAKY = function(
    "Leaky",
    "a w",
    "b c",
    [
        node("MatMul", "a w", "p"),
        referring("LeakyRelu", "p", "b", alpha=("slope", onnx.AttributeProto.FLOAT)),
        node("Neg", "p", "c"),
    ],
    defaults=[helper.make_attribute("slope", 0.3)],
)
TWICE = function(
    "Twice",
    "a w",
    "d",
    [
        call("Leaky", "a w", "p x"),
        call("Leaky", "p w", "q r", slope=0.5),
        node("Add", "q r", "s"),
        node("Sub", "s x", "d"),
    ],
)
CHOICE = function(
    "Choice",
    "a c",
    "b",
    [
        node(
            "If",
            "c",
            "b",
            then_branch=graph(
                [referring("Elu", "a", "t", alpha=("alpha", onnx.AttributeProto.FLOAT))],
                outputs="t",
            ),
            else_branch=graph([node("Neg", "a", "e")], outputs="e"),
        )
    ],
    attributes=["alpha"],
)

# --- recurrent layers --------------------------------------------------------------------------

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def recurrent(
    operator, steps=3, batch=1, size=2, directions=1, given="", output=0, opset=14, **attributes
):
    """A layer of two features; `given` names optional operands, `output` the one that is `y`."""
    gates, random = GATES[operator] * size, np.random.default_rng(3)
    initializers = {
        "W": random.normal(size=(directions, gates, 2)),
        "R": 0.5 * random.normal(size=(directions, gates, size)),
        "B": 0.3 * random.normal(size=(directions, 2 * gates)),
        "h": random.normal(size=(directions, batch, size)),
        "c": random.normal(size=(directions, batch, size)),
        "P": random.normal(size=(directions, 3 * size)),
    }
    initializers = {name: v.astype(np.float32) for name, v in initializers.items()}
    initializers["n"] = np.asarray([steps - 1 - k % 2 for k in range(batch)], np.int32)
    names = ["x", "W", "R", *(k if k in given else "_" for k in "BnhcP")]
    while names[-1] == "_":
        names.pop()
    used = {k: v for k, v in initializers.items() if k in names}
    outputs = ["y" if k == output else f"z{k}" for k in range(2 if operator != "LSTM" else 3)]
    if attributes.get("direction") is None and directions == 2:
        attributes["direction"] = "bidirectional"
    shape = [batch, steps, 2] if attributes.get("layout") else [steps, batch, 2]
    layer = node(operator, " ".join(names), " ".join(outputs), hidden_size=size, **attributes)
    return network([layer], shape, used, opset)


# --- weights of other types --------------------------------------------------------------------

INT8 = np.random.default_rng(5).integers(-128, 128, (6, 3)).astype(np.int8)
SCALES = np.float32([0.1, 0.02, 0.3])


def product(nodes, constants, opset=13):
    """`x f`, where the nodes compute `f`."""
    return network([*nodes, node("MatMul", "x f")], [1, 6], constants, opset)


def dequantized(x, scale, zero=None, opset=13, **attributes):
    names = "w s" if zero is None else "w s z"
    constants = {"w": x, "s": scale} | ({} if zero is None else {"z": zero})
    return product([node("DequantizeLinear", names, "f", **attributes)], constants, opset)


def cast_weights(x, opset=13):
    return product([node("Cast", "w", "f", to=FLOAT)], {"w": x}, opset)


def quantized(zero, scale=None, opset=13, shape=(1, 9), **attributes):
    """The input, quantized and dequantized."""
    scale = scalar(0.1) if scale is None else scale
    nodes = [
        node("QuantizeLinear", "x s z", "q", **attributes),
        node("DequantizeLinear", "q s z", "y", **attributes),
    ]
    return network(nodes, list(shape), {"s": scale, "z": zero}, opset)


STRUCTURES = {
    "if": branch(TRUE),
    "if_else": branch(FALSE),
    "if_folded": network(
        [
            node("Shape", "x", "s"),
            node("ReduceMax", "s", "n", keepdims=0),
            node("Greater", "n five", "c"),
            node("If", "c", then_branch=RELU, else_branch=NEGATIVE),
        ],
        [1, 6],
        {"five": scalar(5, np.int64)},
    ),
    "loop": loop(after=SUM, axes=i64(0)),
    "loop_while": loop(UNTIL, 9, after=SUM, axes=i64(0), two=scalar(2, np.int64)),
    "loop_without_a_count": loop(
        UNTIL, 0, "_ true x", after=SUM, axes=i64(0), two=scalar(2, np.int64)
    ),
    "loop_of_no_steps": loop(count=0, outputs="y all"),
    "loop_that_ends_at_once": loop(names="m false x", outputs="y all", false=FALSE),
    "loop_in_a_loop": nested(),
    "branches_in_a_loop": branches_in_a_loop(),
    "scan": scan(),
    "scan_backwards": scan(scan_input_directions=[1], scan_output_directions=[1]),
    "function": with_functions([call("Leaky", "x w", "y z")], [LEAKY], constants={"w": W}),
    "functions_in_functions": with_functions(
        [call("Twice", "x w", "t"), call("Choice", "t c", alpha=0.7)],
        [CHOICE, TWICE, LEAKY],
        constants={"w": W, "c": TRUE},
    ),
    "rnn": recurrent("RNN"),
    "rnn_relu_both": recurrent(
        "RNN", batch=2, directions=2, given="Bh", activations=["Relu", "LeakyRelu"], clip=0.7
    ),
    "rnn_affine": recurrent(
        "RNN", activations=["HardSigmoid"], activation_alpha=[0.3], activation_beta=[0.4], output=1
    ),
    "gru": recurrent("GRU", given="Bh"),
    "gru_linear_before": recurrent("GRU", given="Bh", linear_before_reset=1, output=1),
    "gru_linear_before_no_bias": recurrent("GRU", linear_before_reset=1),
    "gru_both_lengths": recurrent("GRU", batch=2, directions=2, given="Bn"),
    "gru_lengths_last": recurrent("GRU", batch=3, given="Bnh", output=1, clip=0.4),
    "lstm": recurrent("LSTM", given="B"),
    "lstm_reverse": recurrent("LSTM", given="Bhc", direction="reverse"),
    "lstm_both_last": recurrent("LSTM", batch=2, directions=2, given="Bhc", output=1),
    "lstm_cell": recurrent("LSTM", given="BhcP", output=2),
    "lstm_coupled": recurrent("LSTM", given="B", input_forget=1),
    "lstm_lengths": recurrent("LSTM", batch=2, directions=2, given="Bnhc", output=1, clip=0.3),
    "lstm_activations": recurrent(
        "LSTM", given="B", activations=["HardSigmoid", "Softsign", "Tanh"], output=1
    ),
    "dequantized": dequantized(INT8, scalar(0.05)),
    "dequantized_zero": dequantized(INT8.view(np.uint8), scalar(0.05), scalar(130, np.uint8)),
    "dequantized_axis": dequantized(INT8, SCALES, np.asarray([3, -128, 127], np.int8), axis=-1),
    "dequantized_bias": network(
        [node("DequantizeLinear", "w s", "f"), node("Add", "x f")],
        [1, 6],
        {"w": np.asarray([1, 2**24 + 1, -(2**31), 2**31 - 1, 7, 0], np.int32), "s": scalar(1e-8)},
        13,
    ),
    "dequantized_blocks": dequantized(INT8, np.abs(f32(3, 3)), opset=21, axis=0, block_size=2),
    "quantized": quantized(scalar(3, np.uint8)),
    "quantized_signed_axis": quantized(
        np.asarray([0, -128, 127], np.int8), SCALES, shape=(1, 2, 3), axis=2
    ),
    "quantized_weights": product(
        [node("QuantizeLinear", "w s z", "q"), node("DequantizeLinear", "q s z", "f")],
        {"w": f32(6, 3), "s": scalar(0.0113), "z": scalar(-3, np.int8)},
    ),
    "half_weights": cast_weights(f32(6, 3).astype(np.float16)),
    "bfloat16_weights": cast_weights(f32(6, 3).astype(ml_dtypes.bfloat16)),
    "double_weights": cast_weights(np.random.default_rng(8).normal(size=(6, 3))),
    "moved_doubles": product(
        [node("Transpose", "w", "t"), node("Cast", "t", "f", to=FLOAT)],
        {"w": np.random.default_rng(8).normal(size=(3, 6))},
    ),
    "small_integers_cast": cast_weights(INT8),
}
