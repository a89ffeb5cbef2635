"""l2 norms of linear ops: those of the rows of their matrix, and the spectral norm.

A certificate needs an *upper* bound on the spectral norm. Power iteration approaches the norm from
below, so it is for training only (`power_step`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from boundjax.ir.families import Structural, Weighted, linear_op
from boundjax.ir.node import Node, Op
from boundjax.numerics import length, root
from boundjax.ops import affine, spectrum
from boundjax.sets.rounding import Arithmetic

# A matrix with at most this many elements is written out, which is exact at padded borders.
_UNROLLED = 2**20


def has_spectrum(op: Op | None) -> bool:
    """Whether computing the op's spectral norm takes more than a look at its factors."""
    return isinstance(op, Weighted) and not op.diagonal


def keeps_lengths(node: Node) -> bool:
    """Whether a linear op only moves, negates or drops the elements of its one operand."""
    op = linear_op(node)
    moves = isinstance(op, Structural) and op.moves and len(node.inputs) == 1
    return moves and node.size <= math.prod(node.input_shapes[0].shape)


def mixes(node: Node) -> bool:
    """Whether an element of a linear op's value may depend on several elements of its operands."""
    op = linear_op(node)
    return not op.diagonal if isinstance(op, Weighted) else not op.moves


def row_norms(node: Node) -> tuple[Array, ...]:
    """The l2 norms of the rows of a linear op's matrices, `[*shape]` per perturbed operand.

    Applies the op with squared weights to ones, which is exact at borders of padded convolutions.
    """
    if isinstance(node.op, Weighted):
        (shape,) = node.input_shapes
        return (root(node.apply(jnp.ones(shape.shape, shape.dtype), constants=jnp.square)),)
    return tuple(root(sums) for sums in _row_sums(node))


def radius(node: Node, radii: Sequence[Array], norm: Array | None) -> Array:
    """The radius of a linear op's image of balls, from the radii of these balls.

    Args:
      node: an equation of a `Structural` or `Weighted` op.
      radii: scalars, one per perturbed operand.
      norm: the spectral norm of an op that `has_spectrum`.
    """
    if norm is not None:
        return norm * radii[0]
    if keeps_lengths(node):
        return radii[0]
    if isinstance(node.op, Weighted):
        return _diagonal_norm(node) * radii[0]
    # Schur's test on matrices of 0, 1 and -1: each operand's alone, and all of them side by side.
    rows, columns = _row_sums(node), _column_sums(node)
    images = [
        jnp.sqrt(jnp.max(r) * jnp.max(c)) * radius
        for r, c, radius in zip(rows, columns, radii, strict=True)
    ]
    if len(radii) == 1:
        return images[0]
    most = jnp.max(jnp.stack([jnp.max(c) for c in columns]))
    joint_norm = jnp.sqrt(jnp.max(_sum(rows)) * most)
    joint_radius = root(_sum([jnp.square(r) for r in radii]))
    return jnp.minimum(_sum(images), joint_norm * joint_radius)


def spectral_bound(node: Node) -> Array:
    """A provable upper bound on the spectral norm of a layer, a scalar.

    It is the smaller of two bounds: Schur's `sqrt(max row sum * max column sum)` of the absolute
    weights, and Gram iteration (`spectrum.largest_singular_value`) on the matrix of a small layer,
    the weights of a dense layer, or the frequencies of a convolution on a torus that holds the
    padded image. Weights that are not finite give NaN.
    """
    op = node.op
    assert isinstance(op, Weighted)
    (shape,) = node.input_shapes
    ones = jnp.ones(shape.shape, shape.dtype)
    absolute = jax.linear_transpose(lambda v: node.apply(v, constants=jnp.abs), shape)
    (columns,) = absolute(jnp.ones(node.shape, node.dtype))
    bound = jnp.sqrt(jnp.max(op.magnitude(node, ones))) * jnp.sqrt(jnp.max(columns))
    if node.size * ones.size <= _UNROLLED:
        matrix = affine.pull_back(node, node.unit_rows())[0].reshape(node.size, -1)
        parts = spectrum.largest_singular_value(matrix)
    elif node.primitive == "dot_general":
        parts = spectrum.of_product(node)
    elif node.primitive == "conv_general_dilated":
        parts = spectrum.of_convolution(node)
    else:  # an op that a user registered
        parts = None
    return bound if parts is None else jnp.minimum(bound, jnp.max(parts))


def relative_error(node: Node, arithmetic: Arithmetic) -> float:
    """By how much a computed `spectral_bound` may lie below the norm, relative to it.

    The Gram matrix of a matrix of Frobenius norm 1 is off by `gamma(m)` in Frobenius norm, and its
    own is at least `1 / sqrt(n)` for `n` columns; each further squaring counts half as much as the
    one before. A convolution's matrix at one frequency is off by `gamma` of its taps, relative to
    the norm of its kernel, which the largest frequency's matrix is not below. Complex products
    take twice as many terms, and everything is charged twice.
    """
    op = linear_op(node)
    (shape,) = node.input_shapes
    inputs = math.prod(shape.shape)
    columns, taps = min(node.size, inputs, max(op.terms(node), 1)), max(op.terms(node), 1)
    longest = max(op.terms(node), op.reach(node))
    if node.size * inputs <= _UNROLLED:
        columns, taps, longest = min(node.size, inputs), 1, max(node.size, inputs)
    elif node.primitive == "dot_general":
        taps = 1
    return 4.0 * math.sqrt(columns * taps) * arithmetic.gamma(2 * longest + 64)


def power_step(
    node: Node, vector: Float[Array, "*input"]
) -> tuple[Float[Array, ""], Float[Array, "*input"]]:
    """One power iteration on a layer and its transpose.

    Args:
      node: an equation whose op `has_spectrum`.
      vector: of unit length.

    Returns:
      A lower estimate of the spectral norm, differentiable in the weights, and the next vector (Lee
      et al. 2020; Miyato et al. 2018). No gradient flows through the vectors, which makes no
      difference at convergence.
    """
    constant = jax.lax.stop_gradient
    left = _unit(constant(node.apply(vector)), jnp.zeros(node.shape, node.dtype))
    (back,) = affine.pull_back(node, left[None])
    right = _unit(constant(back[0]), vector)
    return jnp.vdot(constant(left), node.apply(right)), right


def _sum(terms: Sequence[Array]) -> Array:
    return sum(terms[1:], terms[0])


def _unit(value: Array, otherwise: Array) -> Array:
    size = length(value)
    return jnp.where(size == 0, otherwise, value / jnp.where(size == 0, 1.0, size))


def _row_sums(node: Node) -> list[Array]:
    """The row sums of the absolute values of a structural op's matrix, per operand."""
    assert isinstance(node.op, Structural)
    zeros = [jnp.zeros(s.shape, s.dtype) for s in node.input_shapes]
    sums = []
    for k, sign in enumerate(node.op.sign(node)):
        tangents = [jnp.ones_like(z) if i == k else z for i, z in enumerate(zeros)]
        sums.append(sign * jax.jvp(node.apply, tuple(zeros), tuple(tangents))[1])
    return sums


def _column_sums(node: Node) -> list[Array]:
    assert isinstance(node.op, Structural)
    operands = affine.pull_back(node, jnp.ones((1, *node.shape), node.dtype))
    return [sign * o[0] for sign, o in zip(node.op.sign(node), operands, strict=True)]


def _diagonal_norm(node: Node) -> Array:
    """The norm of a diagonal op: a row has one entry, so the matrix's columns are orthogonal."""
    (shape,) = node.input_shapes
    if node.size == math.prod(shape.shape):
        return jnp.max(jnp.abs(node.apply(jnp.ones(shape.shape, shape.dtype))))
    squares = jax.linear_transpose(lambda v: node.apply(v, constants=jnp.square), shape)
    (columns,) = squares(jnp.ones(node.shape, node.dtype))
    return root(jnp.max(columns))
