"""Measures the errors of elementwise functions in float32, and compares them with the stated ones.

    python -m experiments.benchmarks.ulps --stride 127 --report functions.json

A function of one float32 operand has 2^32 inputs: `--stride 1` evaluates all of them (hours), a
larger stride every so many-th, `--magnitudes 0.125 32` those between; the inputs of
`accuracy_cases.special_inputs` are taken in any case. The reference is float64. Runtimes are XLA on
JAX's default device, in three ways (`xla` the function alone on large arrays, `xla-fused` between
other elementwise operations, `xla-scalar` one number at a time, which is other machine code), and
onnxruntime, where ONNX has the function. A row says

* `ulp`: the largest error in units of `2u |f|`, one ulp at least, where `|f|` is a normal number;
* `abs`: the largest error in units of u = 2^-24, where `|f| <= 1`;
* `stated`: the largest error as a share of the stated one (`boundjax.ops.accuracy`), each with the
  input. Losses by underflow are left out of all three, subnormal inputs of the first two.

The exit status is 1 if an error is above half of the stated one. XLA for processors without AVX or
FMA is measured on any other with XLA_FLAGS=--xla_cpu_max_isa=SSE4_2.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from boundjax.ops import accuracy
from boundjax.ops.accuracy_cases import CASES, Case, special_inputs
from experiments.benchmarks import timing
from experiments.settings.errors import ExperimentError

RUNTIMES = ("xla", "onnxruntime")
CHUNK = 2**20
# Loops over single numbers are slow: of every chunk they see this many inputs.
SCALARS = 2**14
# More than half of a stated error leaves too little for other machines.
ALLOWED_SHARE = 0.5
# Flags of /proc/cpuinfo for which XLA's CPU backend generates other code.
_EXTENSIONS = ("sse4_2", "avx", "fma", "avx2", "avx512f", "avx512_bf16", "asimd", "sve")

Program = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass
class Worst:
    """The largest value of a measure so far, and the input it belongs to."""

    value: float = 0.0
    at: float = 0.0

    def update(self, values: np.ndarray, inputs: np.ndarray) -> None:
        """Takes the largest of `values` `[N]`, which hold no NaN."""
        k = int(np.argmax(values)) if values.size else 0
        if values.size and values[k] > self.value:
            self.value, self.at = float(values[k]), float(inputs[k])


@dataclasses.dataclass
class Row:
    """What was measured of one function in one runtime; see the module."""

    ulp: Worst = dataclasses.field(default_factory=Worst)
    absolute: Worst = dataclasses.field(default_factory=Worst)
    share: Worst = dataclasses.field(default_factory=Worst)
    inputs: int = 0

    def update(self, case: Case, x: np.ndarray, computed: np.ndarray, exact: np.ndarray) -> None:
        """Compares computed values with exact ones, all `[N]`."""
        unit, underflow = accuracy.SINGLE.unit, accuracy.SINGLE.underflow
        wide = x.astype(np.float64)
        holds = np.asarray(case.stated.holds(wide, wide, exact, accuracy.SINGLE))
        x, computed, exact = x[holds], computed[holds], exact[holds]
        size = np.abs(exact)
        error = np.abs(computed.astype(np.float64) - exact) - case.stated.underflow * underflow
        error = np.where(np.isnan(error), np.inf, np.maximum(error, 0.0))
        not_subnormal = (x == 0) | (np.abs(x) >= underflow)
        normal, small = not_subnormal & (size >= underflow), not_subnormal & (size <= 1.0)
        self.ulp.update(error[normal] / (2.0 * unit * size[normal]), x[normal])
        self.absolute.update(error[small] / unit, x[small])
        self.share.update(case.shares_of(x, computed, exact), x)
        self.inputs += x.size


def inputs(stride: int, least: float = 0.0, most: float = np.inf) -> Iterator[np.ndarray]:
    """Every `stride`-th float32 number, without NaN, and all special ones; in arrays `[CHUNK]`.

    The last array of each kind is filled up with zeros so that programs are compiled once.

    Args:
      stride: 1 for all numbers.
      least, most: the smallest and the largest magnitude; special numbers have any.
    """
    yield _filled(special_inputs())
    first, last = (int(np.float32(magnitude).view(np.uint32)) for magnitude in (least, most))
    for sign in (0, 2**31):
        for start in range(sign + first, sign + last + 1, CHUNK * stride):
            stop = min(start + CHUNK * stride, sign + last + 1)
            bits = np.arange(start, stop, stride, dtype=np.uint64)
            yield _filled(bits.astype(np.uint32).view(np.float32))


def _filled(numbers: np.ndarray) -> np.ndarray:
    return np.concatenate([numbers, np.zeros(CHUNK - numbers.size, np.float32)])


def xla(case: Case) -> dict[str, Program]:
    """The function as XLA compiles it: alone, fused with other operations, and without vectors."""
    alone = jax.jit(case.function)

    @jax.jit
    def fused(x: jax.Array, zero: jax.Array, one: jax.Array) -> jax.Array:
        # All of this is exact, but the compiler knows neither number.
        return case.function(x * one + zero) * one + zero

    @jax.jit
    def scalar(x: jax.Array) -> jax.Array:
        return jax.lax.map(case.function, x)

    zero, one = jnp.zeros(CHUNK, jnp.float32), jnp.ones(CHUNK, jnp.float32)
    return {
        "xla": lambda x: np.asarray(alone(x)),
        "xla-fused": lambda x: np.asarray(fused(x, zero, one)),
        "xla-scalar": lambda x: np.asarray(scalar(x[:: CHUNK // SCALARS])),
    }


# Operators of ONNX by the names of `CASES`: type, attributes, operands. `x` is the input, `-` the
# value of the operator before, a number a constant.
_Operator = tuple[str, dict[str, Any], tuple[str | float, ...]]


def _one(operator: str, **attributes: Any) -> list[_Operator]:
    return [(operator, attributes, ("x",))]


_ALPHA = 1.7
_OPERATORS: Mapping[str, list[_Operator]] = {
    **{
        name: _one(operator)
        for name, operator in {
            "abs": "Abs", "round": "Round", "relu": "Relu", "exp": "Exp", "log": "Log",
            "tanh": "Tanh", "logistic": "Sigmoid", "erf": "Erf", "sin": "Sin", "cos": "Cos",
            "sinh": "Sinh", "cosh": "Cosh", "asinh": "Asinh", "atan": "Atan", "sqrt": "Sqrt",
            "integer_pow(-1)": "Reciprocal", "softplus": "Softplus", "mish": "Mish",
            "selu": "Selu", "elu": "Elu", "soft_sign": "Softsign", "hard_silu": "HardSwish",
        }.items()
    },
    "exp2": [("Pow", {}, (2.0, "x"))],
    "square": [("Mul", {}, ("x", "x"))],
    "rsqrt": [("Sqrt", {}, ("x",)), ("Reciprocal", {}, ("-",))],
    "silu": [("Sigmoid", {}, ("x",)), ("Mul", {}, ("x", "-"))],
    "gelu": _one("Gelu", approximate="tanh"),
    "gelu_exact": _one("Gelu"),
    "leaky_relu": _one("LeakyRelu", alpha=0.01),
    "elu(1.7)": _one("Elu", alpha=_ALPHA),
    "celu(1.7)": _one("Celu", alpha=_ALPHA),
    **{
        name: [("Pow", {}, ("x", float(name.split("(")[1][:-1])))]
        for name in CASES
        if name.startswith(("pow(", "integer_pow(")) and name != "integer_pow(-1)"
    },
    "pow(0.33333)": [("Pow", {}, ("x", float(np.float32(1.0 / 3.0))))],
}  # fmt: skip


def onnxruntime(name: str) -> dict[str, Program]:
    """The function as onnxruntime computes it, with all its rewrites; empty if ONNX has none.

    Raises:
      ExperimentError: the packages are not installed.
    """
    operators = _OPERATORS.get(name)
    if operators is None:
        return {}
    try:
        onnx, runtime = (importlib.import_module(m) for m in ("onnx", "onnxruntime"))
    except ImportError as error:
        raise ExperimentError(
            f"expected the packages of the extra 'onnx' for onnxruntime, got: {error}; install "
            "boundjax[onnx] or choose --runtime xla"
        ) from error
    helper, single = onnx.helper, onnx.TensorProto.FLOAT
    nodes, constants = [], []
    for k, (operator, attributes, operands) in enumerate(operators):
        names = []
        for operand in operands:
            if isinstance(operand, float):
                constants.append(helper.make_tensor(f"c{k}", single, [], [operand]))
                names.append(f"c{k}")
            else:
                names.append("x" if operand == "x" else f"y{k - 1}")
        nodes.append(helper.make_node(operator, names, [f"y{k}"], **attributes))
    ends = ("x", f"y{len(nodes) - 1}")
    source, sink = (helper.make_tensor_value_info(end, single, [CHUNK]) for end in ends)
    graph = helper.make_graph(nodes, name, [source], [sink], constants)
    # The oldest runtime of the extra reads these versions.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return {"onnxruntime": lambda x: session.run(None, {"x": x})[0]}


def measure(
    name: str, runtimes: Sequence[str], stride: int, least: float = 0.0, most: float = np.inf
) -> dict[str, Row]:
    """Measures one function of `CASES` in every runtime that has it, on `inputs`."""
    case = CASES[name]
    programs = xla(case) if "xla" in runtimes else {}
    if "onnxruntime" in runtimes:
        programs |= onnxruntime(name)
    rows = {runtime: Row() for runtime in programs}
    for x in inputs(stride, least, most) if programs else ():
        with np.errstate(all="ignore"):
            exact = case.reference(x.astype(np.float64))
            for runtime, program in programs.items():
                computed = program(x)
                step = CHUNK // computed.size
                rows[runtime].update(case, x[::step], computed, exact[::step])
    return rows


def instruction_set() -> str:
    """The extensions of this processor that matter to compilers, and XLA's flags."""
    path = pathlib.Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.is_file() else set()
    listed = [extension for extension in _EXTENSIONS if extension in words]
    return " ".join([platform.machine(), *listed, os.environ.get("XLA_FLAGS", "")]).strip()


def versions() -> dict[str, str]:
    """The versions behind the numbers."""
    names = ("jax", "jaxlib", "numpy", "onnxruntime")
    modules = {name: sys.modules.get(name) for name in names}
    return {name: str(m.__version__) for name, m in modules.items() if m is not None}


def main() -> None:
    """Reads the flags, prints a row per function and runtime, and writes the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--functions", nargs="+", choices=CASES, metavar="NAME", default=list(CASES),
        help="default: all, " + ", ".join(CASES),
    )  # fmt: skip
    parser.add_argument(
        "--runtime", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), help="default: both"
    )
    parser.add_argument(
        "--stride", type=int, default=1, help="take every so many-th input (default: 1, all)"
    )
    parser.add_argument(
        "--magnitudes", nargs=2, type=float, metavar=("LEAST", "MOST"), default=(0.0, np.inf),
        help="only inputs of these magnitudes (default: all)",
    )  # fmt: skip
    parser.add_argument("--report", type=pathlib.Path, help="write the rows to this JSON file")
    flags = parser.parse_args()
    if flags.stride < 1:
        parser.error(f"--stride must be >= 1, got {flags.stride}")
    least, most = flags.magnitudes
    if not 0.0 <= least <= most:
        parser.error(f"--magnitudes must be two numbers >= 0 in order, got {least:g} {most:g}")
    print(timing.machine())
    print(f"instruction set: {instruction_set()}")
    print(
        f"every {flags.stride}-th of the inputs of magnitudes {least:g} to {most:g}, and "
        f"{special_inputs().size} special ones"
    )
    report: dict[str, dict[str, Any]] = {}
    too_far = []
    for name in flags.functions:
        try:
            rows = measure(name, flags.runtime, flags.stride, least, most)
        except ExperimentError as error:
            sys.exit(f"error: {error}")
        for runtime, row in rows.items():
            above = row.share.value > ALLOWED_SHARE
            too_far += [f"{name} ({runtime})"] * above
            print(
                f"{name:<16} {runtime:<12}"
                f" ulp {row.ulp.value:9.3g} at {row.ulp.at:<14.8g}"
                f" abs {row.absolute.value:9.3g} at {row.absolute.at:<14.8g}"
                f" stated {row.share.value:6.1%} at {row.share.at:<14.8g}"
                f"{' ABOVE HALF' if above else ''}".rstrip(),
                flush=True,
            )
        report[name] = {runtime: dataclasses.asdict(row) for runtime, row in rows.items()}
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    if flags.report is not None:
        record = {
            "versions": versions(),
            "instruction_set": instruction_set(),
            "stride": flags.stride,
            "magnitudes": [least, most if math.isfinite(most) else None],
            "functions": report,
        }
        flags.report.write_text(json.dumps(record, indent=1) + "\n")
    if too_far:
        sys.exit(f"error: above half of the stated error: {', '.join(too_far)}")


if __name__ == "__main__":
    main()
