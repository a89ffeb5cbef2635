"""What cannot be bounded: one line with the op, the place, the reason and the cure."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj

pytestmark = pytest.mark.quick

BOX = bj.Box(jnp.full(4, 0.5), jnp.ones(4))
MATRIX = (
    "it factors or inverts a matrix that depends on the perturbed input (jnp.linalg.solve, inv, "
    "det, ...), and only right-hand sides may; write the formula of a small matrix out, or move "
    "this op out of the bounded function"
)
COMPLEX = (
    "it computes with complex numbers of a perturbed value, and only real ones have bounds; write "
    "a Fourier transform as two products, with F = jnp.fft.fft(jnp.eye(n)): x @ F.real and "
    "x @ F.imag, and an absolute value as the root of the sum of squares"
)
OUTSIDE = (
    "nobody knows what code outside of JAX computes of a perturbed value; write it in JAX, or move "
    "it out of the bounded function"
)
KEY = (
    "its random key depends on the perturbed input; make the key outside, so that the draw is a "
    "constant"
)
NAMED_AXIS = (
    "it combines values over a named axis, and bounds are of one example at a time; leave "
    "axis_name= out (BatchNorm: use_running_average=True), or use jnp.sum and its like over an "
    "axis of the array itself"
)
UNBOUND = (
    "it combines values over the axis 'batch', which no vmap or shard_map names here, because "
    "bounds are of one example at a time; leave axis_name= out, or bound the module in eval mode "
    "(BatchNorm: use_running_average=True)"
)
TRIP_COUNT = (
    "its trip count depends on the perturbed input; use jax.lax.scan, or fori_loop with Python "
    "integers as its bounds"
)
DECIDES = (
    "Python's if, while, and, or, not decide on a value that is not known while tracing; use "
    "jnp.where or jax.lax.cond on the predicate"
)
NUMBER = (
    "it turns a value that is not known while tracing into a Python number or a NumPy array "
    "(float(), int(), range(), numpy, a shape); use jax.numpy instead, and constants for shapes"
)
SELECTS = (
    "it selects elements by a condition that is not known while tracing, so their number is "
    "unknown; use jnp.where(condition, x, 0.0), which keeps the shape"
)
LOOKED_UP = (
    "it takes the input as an index, and an input set holds floating-point numbers (a set of "
    "integers is one of float32); bound the function of the vectors that are looked up"
)


def square(x):
    return x.reshape(2, 2)


def batch_norm(x):
    layer = nn.BatchNorm(use_running_average=False, axis_name="batch")
    state = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    variables = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}, "batch_stats": state}
    return layer.apply(variables, x[None], mutable=["batch_stats"])[0]


def shape_of(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


OPS = {
    "fft": (lambda x: jnp.abs(jnp.fft.fft(x)), "fft", COMPLEX),
    "rfft": (lambda x: jnp.fft.rfft(x).real, "fft", COMPLEX),
    "irfft": (lambda x: jnp.fft.irfft(x), "fft", COMPLEX),
    "fft2": (lambda x: jnp.abs(jnp.fft.fft2(square(x))), "fft", COMPLEX),
    "complex numbers": (lambda x: jnp.abs(jax.lax.complex(x, x)), "complex", COMPLEX),
    "complex constants": (
        lambda x: jnp.abs(x * (1.0 + 2.0j)),
        "convert_element_type",
        COMPLEX,
    ),
    "complex result": (lambda x: x.astype(jnp.complex64), "convert_element_type", COMPLEX),
    "cholesky": (lambda x: jnp.linalg.cholesky(square(x)), "cholesky", MATRIX),
    "eigh": (lambda x: jnp.linalg.eigh(square(x))[0], "eigh", MATRIX),
    "svd": (lambda x: jnp.linalg.svd(square(x))[1], "svd", MATRIX),
    "nuclear norm": (lambda x: jnp.linalg.norm(square(x), "nuc"), "svd", MATRIX),
    "qr": (lambda x: jnp.linalg.qr(square(x))[1], "qr", MATRIX),
    "det": (lambda x: jnp.linalg.det(jnp.diag(x)), "lu", MATRIX),
    "slogdet": (lambda x: jnp.linalg.slogdet(jnp.diag(x))[1], "lu", MATRIX),
    "inv": (lambda x: jnp.linalg.inv(jnp.diag(x)), "lu", MATRIX),
    "while": (
        lambda x: jax.lax.while_loop(lambda c: c.sum() < 10.0, lambda c: 2.0 * c, x),
        "while",
        TRIP_COUNT,
    ),
    "fori": (
        lambda x: jax.lax.fori_loop(0, x.sum().astype(int), lambda _, c: 2.0 * c, x),
        "while",
        TRIP_COUNT,
    ),
    "callback": (lambda x: jax.pure_callback(np.sin, shape_of(x), x), "pure_callback", OUTSIDE),
    "io callback": (
        lambda x: jax.experimental.io_callback(np.sin, shape_of(x), x),
        "io_callback",
        OUTSIDE,
    ),
    "key": (
        lambda x: x + jax.random.normal(jax.random.key(x[0].astype(int)), (4,)),
        "random_seed",
        KEY,
    ),
    "fold in": (
        lambda x: x + jax.random.uniform(jax.random.fold_in(jax.random.key(0), x[0] > 0.7)),
        "random_fold_in",
        KEY,
    ),
    "outer axis": (
        lambda x: jax.vmap(lambda y: jax.lax.psum(y, "axis"), axis_name="axis")(x),
        "psum",
        NAMED_AXIS,
    ),
}


@pytest.mark.parametrize("case", OPS)
def test_ops_without_bounds(case):
    function, op, reason = OPS[case]
    with pytest.raises(bj.UnsupportedOpError) as raised:
        bj.linear(function)(BOX)
    expected = rf"no bounds for the op '{op}' at \S*{re.escape(__file__)}:\d+ \(.*\): "
    assert re.fullmatch(expected + re.escape(reason), str(raised.value)), raised.value


FUNCTIONS = {
    "psum": (lambda x: jax.lax.psum(x, "batch"), UNBOUND),
    "pmean": (lambda x: x - jax.lax.pmean(x, axis_name="batch"), UNBOUND),
    "axis index": (lambda x: x * jax.lax.axis_index("batch"), UNBOUND),
    "batch norm": (batch_norm, UNBOUND),
    "if": (lambda x: x if x[0] > 0.7 else -x, DECIDES),
    "and": (lambda x: jnp.where((x > 0.7).all() and (x < 0.9).all(), x, -x), DECIDES),
    "float": (lambda x: x * float(x[0]), NUMBER),
    "range": (lambda x: sum(x[i] for i in range(int(x[0]))), NUMBER),
    "numpy": (lambda x: np.sin(x), NUMBER),
    "shape": (lambda x: jnp.zeros(x[0].astype(int)), NUMBER),
    "boolean index": (lambda x: x[x > 0.7], SELECTS),
    "nonzero": (lambda x: jnp.nonzero(x)[0], NUMBER),
    "integers": (lambda x: jnp.arange(9.0)[x], LOOKED_UP),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_that_cannot_be_traced(case):
    function, reason = FUNCTIONS[case]
    with pytest.raises(bj.UnsupportedOpError) as raised:
        bj.interval(function)(BOX)
    expected = rf"the function cannot be bounded at \S*{re.escape(__file__)}:\d+ \(.*\): "
    assert re.fullmatch(expected + re.escape(reason), str(raised.value)), raised.value
    assert raised.value.__cause__ is not None


def test_certify_says_the_same():
    with pytest.raises(bj.UnsupportedOpError, match=re.escape(UNBOUND)):
        bj.certify(lambda x: x - jax.lax.pmean(x, "batch"), np.ones((2, 3), np.float32), 0.1)


def test_other_errors_of_a_function_stay():
    def fails(x):
        raise TypeError("of the user")

    with pytest.raises(TypeError, match="of the user"):
        bj.linear(fails)(BOX)


def test_a_draw_with_a_constant_key_is_a_constant():
    bounds = bj.linear(lambda x: x + jax.random.normal(jax.random.key(0), x.shape))(BOX)
    noise = jax.random.normal(jax.random.key(0), (4,))
    np.testing.assert_allclose(bounds.lower, BOX.lower + noise, rtol=1e-6)


@pytest.mark.parametrize("transform", [bj.interval, bj.linear, bj.lipschitz])
@pytest.mark.sampled(3)
def test_float64_numbers_that_are_rounded_are_mentioned(transform):
    message = r"float64 numbers that JAX rounds to float32, such as .*0\.1.*; give float32 arrays"
    for input_set in (bj.Box(np.zeros(2), np.full(2, 0.1)), bj.LpBall(np.full(2, 0.1), 0.5)):
        with pytest.warns(UserWarning, match=message):
            transform(jnp.sin)(input_set)
    # Nothing is lost here: no warning, which would be an error.
    transform(jnp.sin)(bj.Box(np.zeros(2), np.full(2, 0.5)))
    transform(jnp.sin)(bj.Box(jnp.zeros(2), jnp.full(2, 0.1)))
    with jax.enable_x64(True):
        transform(jnp.sin)(bj.Box(np.zeros(2), np.full(2, 0.1)))
