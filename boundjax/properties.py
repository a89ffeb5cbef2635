"""Properties of a network: boxes of inputs, and the outputs that would be unsafe.

`predicts`, `within`, `all_positive` and `any_positive` make an `OutputProperty` for
`boundjax.prove`; `&` and `|` combine them. `equivalent` compares two networks. A `Property` holds
boxes of inputs as well, as files state them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Num
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True, eq=False)
class Conjunction:
    """The unsafe outputs `y` with `weights @ y + offset <= 0` in every row.

    Ties are unsafe, except in rows that are strict. A proof always refutes them as well.

    Attributes:
      weights: float64 `[k, m]` for `k` rows and `m` outputs.
      offset: float64 `[k]`.
      exact: for each row the nonzero weights by output, and the offset, before rounding to float64.
        None if the arrays are the exact numbers.
      strict: for each row whether it needs a value below 0; None if none does.
    """

    weights: Float64[np.ndarray, "k m"]
    offset: Float64[np.ndarray, " k"]
    exact: tuple[tuple[dict[int, Fraction], Fraction], ...] | None = dataclasses.field(
        default=None, repr=False
    )
    strict: tuple[bool, ...] | None = None

    def contains(self, outputs: Num[np.ndarray, " m"]) -> bool:
        """Whether outputs `[m]` are unsafe, decided in exact arithmetic on these very numbers.

        An infinite output is larger than any number. Outputs are not unsafe if one of them is NaN,
        or if infinities cancel in a row, because the row then has no value.

        Raises:
          ValueError: if the number of outputs is not that of the weights in a row.
        """
        outputs = np.asarray(outputs).reshape(-1)
        weights, offset = np.asarray(self.weights), np.asarray(self.offset)
        if len(outputs) != weights.shape[1]:
            raise ValueError(f"expected {weights.shape[1]} outputs, got {len(outputs)}")
        if np.isnan(outputs).any():
            return False
        if np.isinf(outputs).any():
            return self._holds(outputs)
        # Most outputs are too far from unsafe for float64 to be wrong.
        with np.errstate(all="ignore"):
            sizes = np.abs(outputs).astype(np.float64)
            values = weights @ outputs.astype(np.float64) + offset
            terms = np.abs(weights) @ sizes + np.abs(offset)
            if (values > (len(outputs) + 8) * 2.0**-50 * terms + 1e-290).any():
                return False
        return self._holds(outputs)

    def _holds(self, outputs: np.ndarray) -> bool:
        """Whether all rows hold in exact arithmetic; no output is NaN."""
        rows, strict = self.exact_rows(), self.strict_rows
        return all(_holds(*row, s, outputs) for row, s in zip(rows, strict, strict=True))

    @property
    def strict_rows(self) -> tuple[bool, ...]:
        """For each row whether it is strict."""
        return (False,) * len(self.offset) if self.strict is None else self.strict

    def exact_rows(self) -> Iterator[tuple[dict[int, Fraction], Fraction]]:
        """For each row the nonzero weights by output, and the offset."""
        if self.exact is not None:
            yield from self.exact
            return
        for row, constant in zip(self.weights, self.offset, strict=True):
            terms = {int(i): Fraction(row[i].item()) for i in np.flatnonzero(row)}
            yield terms, Fraction(constant.item())


def _holds(row: dict[int, Fraction], constant: Fraction, strict: bool, outputs: np.ndarray) -> bool:
    """Whether a row of weights times outputs, plus a constant, is <= 0, or < 0 if it is strict."""
    infinite = {
        np.sign(outputs[i]) * (1 if w > 0 else -1) for i, w in row.items() if np.isinf(outputs[i])
    }
    if infinite:
        return infinite == {-1}
    value = sum((w * Fraction(outputs[i].item()) for i, w in row.items()), constant)
    return value < 0 if strict else value <= 0


@dataclasses.dataclass(frozen=True, eq=False)
class OutputProperty:
    """What is to hold for the outputs `[m]`: that no conjunction contains them.

    `first & second` holds where both hold, `first | second` where at least one of them holds.

    Attributes:
      unsafe: the conjunctions, one or more.

    Raises:
      ValueError: for no conjunction, or conjunctions of different numbers of outputs.
    """

    unsafe: tuple[Conjunction, ...]

    def __post_init__(self) -> None:
        sizes = {conjunction.weights.shape[1] for conjunction in self.unsafe}
        if len(sizes) != 1:
            raise ValueError(
                "an OutputProperty needs conjunctions of one number of outputs, got "
                f"{len(self.unsafe)} conjunctions of {sorted(sizes) or 'none'}"
            )

    @property
    def output_size(self) -> int:
        """`m`."""
        return self.unsafe[0].weights.shape[1]

    def holds(self, outputs: Num[np.ndarray, "*out"]) -> bool:
        """Whether outputs, flattened in C order, have the property, in exact arithmetic.

        NaN does not have it.
        """
        flat = np.asarray(outputs).reshape(-1)
        return not np.isnan(flat).any() and not any(c.contains(flat) for c in self.unsafe)

    def __and__(self, other: OutputProperty) -> OutputProperty:
        return OutputProperty(self.unsafe + other.unsafe)

    def __or__(self, other: OutputProperty) -> OutputProperty:
        return OutputProperty(tuple(_both(a, b) for a in self.unsafe for b in other.unsafe))


def _both(first: Conjunction, second: Conjunction) -> Conjunction:
    """The outputs in both conjunctions."""
    exact = None
    if first.exact is not None or second.exact is not None:
        exact = (*first.exact_rows(), *second.exact_rows())
    strict = (*first.strict_rows, *second.strict_rows)
    return Conjunction(
        np.concatenate([first.weights, second.weights]),
        np.concatenate([first.offset, second.offset]),
        exact,
        strict if any(strict) else None,
    )


def all_positive(weights: ArrayLike, offset: ArrayLike = 0.0) -> OutputProperty:
    """The property that every row of `weights @ y + offset` is positive.

    Args:
      weights: `[R, *out]` for `R` rows and outputs of shape `[*out]`, such as
        `boundjax.margin_specification` returns.
      offset: a number, or one for each row `[R]`.

    Raises:
      ValueError: for no row, other shapes, or numbers that are not finite.
    """
    rows, constants = _rows(weights, offset)
    return OutputProperty(
        tuple(Conjunction(rows[k : k + 1], constants[k : k + 1]) for k in range(len(rows)))
    )


def any_positive(weights: ArrayLike, offset: ArrayLike = 0.0) -> OutputProperty:
    """The property that at least one row of `weights @ y + offset` is positive.

    Args:
      weights, offset: as of `all_positive`.

    Raises:
      ValueError: as `all_positive`.
    """
    return OutputProperty((Conjunction(*_rows(weights, offset)),))


def predicts(label: int, classes: int) -> OutputProperty:
    """The property that the logit of `label` is larger than all others.

    Args:
      label: in `0..classes - 1`.
      classes: the number of logits, at least 2.

    Raises:
      ValueError: for a label out of range or fewer than two classes.
    """
    if classes < 2 or not 0 <= label < classes:
        raise ValueError(
            f"predicts needs a label in 0..classes - 1 and two classes, got {label} of {classes}"
        )
    rows = -np.eye(classes)
    rows[:, label] += 1.0
    return all_positive(np.delete(rows, label, axis=0))


def within(
    lower: ArrayLike | None, upper: ArrayLike | None, shape: tuple[int, ...] | None = None
) -> OutputProperty:
    """The property that `lower <= y <= upper` for every output `y`, `[*out]`.

    A proof needs bounds strictly inside: a limit that is attained, such as 0 by a ReLU, is neither
    broken nor proved.

    Args:
      lower, upper: numbers, or arrays that broadcast to the outputs; None for no limit.
      shape: of the outputs; by default that of the limits.

    Raises:
      ValueError: for no limit, limits that are not finite, of other shapes, or `lower > upper`.
    """
    limits = [np.asarray(v, np.float64) for v in (lower, upper) if v is not None]
    shapes = [limit.shape for limit in limits]
    if not limits:
        raise ValueError("within needs a lower or an upper limit, got neither")
    try:
        joint = np.broadcast_shapes(*shapes)
        outputs = joint if shape is None else tuple(shape)
        fits = np.broadcast_shapes(joint, outputs) == outputs and np.prod(outputs) > 0
    except ValueError:
        outputs, fits = shape, False
    if outputs is None or not fits:
        raise ValueError(
            f"limits must broadcast to the outputs' shape, got {' and '.join(map(str, shapes))} "
            f"for {outputs}"
        )
    if not all(np.isfinite(limit).all() for limit in limits):
        raise ValueError("limits must be finite numbers, got NaN or infinity; None is no limit")
    if len(limits) == 2 and (limits[0] > limits[1]).any():
        raise ValueError("lower must be at most upper, got a limit above the other")
    conjunctions: list[Conjunction] = []
    for limit, sign in ((lower, 1.0), (upper, -1.0)):
        if limit is None:
            continue
        values = np.broadcast_to(np.asarray(limit, np.float64), outputs).reshape(-1)
        rows = sign * np.eye(len(values))
        conjunctions += [
            Conjunction(rows[k : k + 1], -sign * values[k : k + 1], strict=(True,))
            for k in range(len(values))
        ]
    return OutputProperty(tuple(conjunctions))


def equivalent(tolerance: float) -> Callable[[Any], Any]:
    """The property of a pair of outputs that they differ by at most `tolerance` in every element.

    `boundjax.prove(lambda x: (f(x), g(x)), box, equivalent(0.1))` compares two networks.

    Args:
      tolerance: positive; numbers that are equal up to rounding have no smaller proof.

    Returns:
      A function of a pair of arrays of one shape, or of pytrees with one structure, that returns
      booleans `[K]` for their `K` elements, each of which is to be true.

    Raises:
      ValueError: for a tolerance that is not a positive finite number; when the property is used,
        for anything but such a pair.
    """
    if not (np.ndim(tolerance) == 0 and 0.0 < tolerance < np.inf):
        raise ValueError(f"tolerance must be a positive finite number, got {tolerance}")

    def property(outputs: Any) -> Any:
        import jax
        import jax.numpy as jnp

        if not isinstance(outputs, tuple | list) or len(outputs) != 2:
            got = f"{len(outputs)} outputs" if isinstance(outputs, tuple | list) else "one output"
            raise ValueError(
                f"equivalent needs a pair of outputs, as of lambda x: (f(x), g(x)), got {got}"
            )
        (first, tree), (second, other) = map(jax.tree.flatten, outputs)
        shapes = [list(map(jnp.shape, leaves)) for leaves in (first, second)]
        if tree != other or shapes[0] != shapes[1] or not first:
            raise ValueError(
                "equivalent needs two outputs of one structure and shape, got "
                f"{' and '.join(str([*map(str, s)]) for s in shapes)}"
            )
        # Two comparisons without |.| have linear bounds.
        differences = [jnp.ravel(a - b) for a, b in zip(first, second, strict=True)]
        both = [comparison for d in differences for comparison in (d <= tolerance, -d <= tolerance)]
        return jnp.concatenate(both)

    return property


def _rows(weights: ArrayLike, offset: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    rows, constants = np.asarray(weights, np.float64), np.asarray(offset, np.float64)
    if rows.ndim < 2 or rows.size == 0 or constants.shape not in ((), rows.shape[:1]):
        raise ValueError(
            f"weights must be [R, *out] and offset a number or [R], got {rows.shape} and "
            f"{constants.shape}"
        )
    if not (np.isfinite(rows).all() and np.isfinite(constants).all()):
        raise ValueError("weights and offset must be finite numbers")
    return rows.reshape(len(rows), -1), np.broadcast_to(constants, rows.shape[:1])


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A box of inputs and the unsafe outputs; the case is unsafe if an input reaches one of them.

    Attributes:
      lower, upper: float32 `[n]`; the file's box with its decimals rounded outward, so that it
        loses no input and proofs hold for the file's box.
      inner_lower, inner_upper: float32 `[n]`; the box rounded inward, in which counterexamples are
        searched. An input without a float32 between its bounds (both `0.1`, say) is fixed at the
        float32 nearest to their middle, the only meaning that a float32 network can give it.
      conjunctions: an output is unsafe if any of them contains it.
    """

    lower: Float32[np.ndarray, " n"]
    upper: Float32[np.ndarray, " n"]
    inner_lower: Float32[np.ndarray, " n"]
    inner_upper: Float32[np.ndarray, " n"]
    conjunctions: tuple[Conjunction, ...]

    @classmethod
    def flattened(
        cls,
        outer: tuple[np.ndarray, np.ndarray],
        inner: tuple[np.ndarray, np.ndarray],
        conjunctions: tuple[Conjunction, ...],
    ) -> Case:
        """The case of two boxes whose ends `[*shape]` are flattened in C order."""
        (lower, upper), (inner_lower, inner_upper) = outer, inner
        ends = (lower, upper, inner_lower, inner_upper)
        return cls(*(end.reshape(-1) for end in ends), conjunctions=conjunctions)


@dataclasses.dataclass(frozen=True, eq=False)
class Property:
    """The assertion of a file; the network is unsafe if any of the cases is.

    Attributes:
      input_size: number of inputs `X_0, ...`, the input tensor flattened in C order.
      output_size: number of outputs `Y_0, ...`, flattened likewise.
      cases: one or more, with different boxes.
      on_inputs: whether rows weigh the outputs and after them the inputs, `m + n` numbers: inputs
        are constrained together, or with outputs.
      products: of two of these numbers each, by their positions; rows weigh them after all others.
    """

    input_size: int
    output_size: int
    cases: tuple[Case, ...]
    on_inputs: bool = False
    products: tuple[tuple[int, ...], ...] = ()

    def weighed(
        self, outputs: Num[np.ndarray, " m"], inputs: Num[np.ndarray, " n"]
    ) -> Num[np.ndarray, " k"]:
        """What rows weigh, exactly for float32 numbers: in float64 if there are products."""
        if not self.on_inputs:
            return outputs
        values = np.concatenate([outputs, inputs])
        if not self.products:
            return values
        values = values.astype(np.float64)
        products = values[np.asarray(self.products)].prod(axis=1)
        return np.concatenate([values, products])
