"""Single joint ops for the tests: their nodes, boxes of every kind, the named functions."""

import jax
import jax.numpy as jnp
import numpy as np

import boundjax as bj
from boundjax.ir.composite import composite
from boundjax.ir.families import Joint
from boundjax.ops import exponentials, normalization
from boundjax.tracing.trace import trace


def named(name, function, *operands, **params):
    """A named op where it is traced to a graph; there is no other way to evaluate one."""
    return composite(name, function, *operands, **params)


def log_softmax(x, axes=(-1,)):
    return named("log_softmax", exponentials.log_softmax, x, axes=axes)


def logsumexp(x, axes=(-1,)):
    return named("logsumexp", exponentials.logsumexp, x, axes=axes)


def normalize(d, r, axes=(-1,), eps=1e-5):
    return named("normalize", normalization.normalize, d, r, axes=axes, eps=eps)


def joint_node(function, *shapes, dtype=np.float64):
    """The node of the one joint op of `function(*operands)`."""
    sizes = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

    def flat(x):
        parts = jnp.split(x, sizes)
        return function(*(p.reshape(s) for p, s in zip(parts, shapes, strict=True)))

    size = sum(int(np.prod(shape)) for shape in shapes)
    nodes = trace(flat, jnp.zeros(size, dtype)).nodes
    (node,) = [n for n in nodes if isinstance(n.op, Joint)]
    return node


JOINT = {
    "mul": (lambda x, y: x * y, (5,), (5,)),
    "mul by a scalar": (lambda x, y: jax.lax.mul(x, y), (2, 3), ()),
    "matmul": (lambda x, y: x @ y, (2, 3), (3, 2)),
    "attention": (lambda x, y: jnp.einsum("hqd,hkd->hqk", x, y), (2, 2, 3), (2, 3, 3)),
    "contraction": (lambda x, y: jnp.einsum("abcd,cbea->dae", x, y), (2, 1, 2, 2), (2, 1, 2, 2)),
    "dot": (lambda x, y: jnp.dot(x, y), (4,), (4,)),
    "log_softmax": (log_softmax, (4,)),
    "log_softmax of rows": (lambda x: log_softmax(x, (1,)), (2, 3, 2)),
    "log_softmax of one": (log_softmax, (3, 1)),
    "log_softmax of planes": (lambda x: log_softmax(x, (0, 2)), (2, 2, 2)),
    "logsumexp": (logsumexp, (4,)),
    "logsumexp of planes": (lambda x: logsumexp(x, (0, 2)), (2, 3, 2)),
    "logsumexp of one": (logsumexp, (3, 1)),
}


def boxes(rng, size, dtype):
    """Boxes `[size]` of every kind."""
    centre = rng.normal(size=size)
    yield "degenerate", centre, centre
    for scale in (1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3):
        radius = scale * rng.uniform(size=size)
        yield f"radius {scale}", centre - radius, centre + radius
    yield "one-signed", 0.5 + np.abs(centre), 0.7 + 3 * np.abs(centre)
    yield "negative", -0.7 - 3 * np.abs(centre), -0.5 - np.abs(centre)
    partly = rng.uniform(size=size) < 0.5
    yield "partly fixed", centre - 2 * partly, centre + 3 * partly
    yield "all zero", 0 * centre, 0 * centre
    yield "far", 900 + centre, 901 + centre
    yield "apart", 30 * centre - 0.5, 30 * centre + 0.5
    yield "one large", centre - 8.0 * (np.arange(size) == 1), centre + 8.0 * (np.arange(size) == 1)
    yield "at zero", np.zeros(size), np.abs(centre)


def operands_of(node, values):
    """Splits a vector `[size]` into operands of the node's shapes."""
    sizes = np.cumsum([int(np.prod(s.shape)) for s in node.input_shapes])
    parts = np.split(values, sizes[:-1], axis=-1)
    return [
        jnp.asarray(np.reshape(p, (*values.shape[:-1], *s.shape)))
        for p, s in zip(parts, node.input_shapes, strict=True)
    ]


def default_position(lower, upper, default):
    return default


def linear_alone(function, **options):
    """The linear bounds, not intersected with interval bounds: an error could hide in those."""

    def bounds(input_set):
        result, aux = bj.linear(function, has_aux=True, **options)(input_set)
        return bj.Interval(*(end.reshape(result.lower.shape) for end in aux.linear))

    return bounds


def reciprocal(d, axes, eps):
    mean = jnp.mean(jnp.square(d), axes, keepdims=True)
    return jnp.broadcast_to(jax.lax.rsqrt(mean + eps), d.shape)
