"""Bounds that two other libraries computed on fixed networks (`../shared/golden/README.md`)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import boundjax as bj

pytestmark = pytest.mark.usefixtures("optimized")

# The two files agree to 3e-6; our bounds must agree to 1e-4.
TOLERANCE = 1e-4

GOLDEN_METHODS = {
    "ibp": bj.interval,
    "crown_ibp": functools.partial(bj.linear, intermediate="interval"),
    "crown": functools.partial(bj.linear, intermediate="linear"),
}


def convolution(x, kernel, bias, numbers):
    """Kernel 4, stride 2, padding 1, on one example; `numbers` such as ("NHWC", "HWIO", "NHWC")."""
    y = jax.lax.conv_general_dilated(
        x[None], kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers
    )[0]
    channels_last = numbers[2].endswith("C")
    return y + (bias[None, None, :] if channels_last else bias[:, None, None])


def mlp(weights, x):
    x = x.reshape(-1)
    for kernel, bias in weights[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    kernel, bias = weights[-1]
    return x @ kernel + bias


def conv_net(weights, numbers, x):
    for kernel, bias in weights[:2]:
        x = jax.nn.relu(convolution(x, kernel, bias, numbers))
    return mlp(weights[2:], x)


def jax_verify_network(data, net):
    layers = 3 if net == "mlp" else 4
    weights = [(data[f"{net}_w{k}"], data[f"{net}_b{k}"]) for k in range(layers)]
    numbers = ("NHWC", "HWIO", "NHWC")
    return (
        functools.partial(mlp, weights)
        if net == "mlp"
        else functools.partial(conv_net, weights, numbers)
    )


def auto_lirpa_network(data, net):
    """The layers in the order of the file's names; linear layers are stored `[out, in]`."""
    names = sorted({key.split("/")[2] for key in data.files if key.startswith(f"weights/{net}/")})
    weights = [(data[f"weights/{net}/{name}/W"], data[f"weights/{net}/{name}/b"]) for name in names]
    weights = [(w.T if w.ndim == 2 else w, b) for w, b in weights]
    numbers = ("NCHW", "OIHW", "NCHW")
    return (
        functools.partial(mlp, weights)
        if net == "mlp"
        else functools.partial(conv_net, weights, numbers)
    )


def compare(bounds, lower, upper):
    np.testing.assert_allclose(bounds.lower, lower, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(bounds.upper, upper, rtol=0, atol=TOLERANCE)


def batch_bounds(function, method, x, eps, **options):
    transform = GOLDEN_METHODS[method](function, **options)
    return jax.jit(jax.vmap(lambda x: transform(bj.LpBall(x, eps))))(x)


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("method", GOLDEN_METHODS)
@pytest.mark.sampled(7)
def test_jax_verify(shared, net, method):
    data = np.load(shared / "golden" / "jax_verify.npz")
    function = jax_verify_network(data, net)
    # Full CROWN runs one backward pass per neuron, so the convolutional net gets a few examples.
    count = 4 if (net, method) == ("conv", "crown") else 16
    x, eps = jnp.asarray(data["x"][:count]), float(data["eps"])
    np.testing.assert_allclose(
        jax.vmap(function)(x), data[f"{net}_logits"][:count], rtol=0, atol=TOLERANCE
    )
    bounds = batch_bounds(function, method, x, eps)
    compare(bounds, *(data[f"{net}_{method}_{end}"][:count] for end in ("lower", "upper")))


@pytest.mark.parametrize("net", ["mlp", "small"])
@pytest.mark.parametrize("method", GOLDEN_METHODS)
@pytest.mark.sampled(7)
def test_auto_lirpa(shared, net, method):
    data = np.load(shared / "golden" / "auto_lirpa.npz")
    function = auto_lirpa_network(data, net)
    count = 4 if (net, method) == ("small", "crown") else data[f"bounds/{net}/x"].shape[0]
    x, eps = jnp.asarray(data[f"bounds/{net}/x"][:count]), float(data[f"bounds/{net}/eps"])
    np.testing.assert_allclose(
        jax.vmap(function)(x), data[f"bounds/{net}/y"][:count], rtol=0, atol=TOLERANCE
    )
    bounds = batch_bounds(function, method, x, eps)
    compare(bounds, *(data[f"bounds/{net}/{method}/{end}"][:count] for end in ("lb", "ub")))


@pytest.mark.parametrize("net", ["mlp", "small"])
@pytest.mark.parametrize("method", ["ibp", "crown"])
@pytest.mark.sampled(4)
def test_auto_lirpa_intermediate_bounds(shared, net, method):
    data = np.load(shared / "golden" / "auto_lirpa.npz")
    function = auto_lirpa_network(data, net)
    count = 2
    x, eps = jnp.asarray(data[f"bounds/{net}/x"][:count]), float(data[f"bounds/{net}/eps"])
    _, aux = batch_bounds(function, method, x, eps, has_aux=True)
    # bj.interval returns pre-activation bounds only.
    pre_activations = aux if method == "ibp" else aux.pre_activations
    stored = sorted(
        key.removesuffix("/lb")
        for key in data.files
        if key.startswith(f"bounds/{net}/{method}_interm/") and key.endswith("/lb")
    )
    assert len(stored) == len(pre_activations) > 0
    for key, bounds in zip(stored, pre_activations.values(), strict=True):
        lower, upper = data[f"{key}/lb"][:count], data[f"{key}/ub"][:count]
        # Where interval bounds prove a unit stable, auto_LiRPA computes no linear bound for it and
        # keeps the wider interval of the same sign: compare the others.
        unstable = np.asarray((bounds.lower < 0) & (bounds.upper > 0)).reshape(lower.shape)
        assert unstable.any()
        for ours, expected in zip(bounds, (lower, upper), strict=True):
            ours = np.asarray(ours).reshape(lower.shape)
            np.testing.assert_allclose(ours[unstable], expected[unstable], rtol=0, atol=TOLERANCE)


# Intermediate bounds, whether their slopes are optimised, too, and the number of examples.
ALPHA = {
    "alpha_fixed_ibp_interm": ("interval", False, {"mlp": 16, "small": 16}),
    "alpha_fixed_crown_interm": ("linear", False, {"mlp": 16, "small": 2}),
    "alpha_crown": ("linear", True, {"mlp": 16, "small": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "small"])
@pytest.mark.parametrize("stored", ALPHA)
def test_alpha_crown_is_no_looser_than_auto_lirpa(shared, net, stored):
    data = np.load(shared / "golden" / "auto_lirpa.npz")
    function = auto_lirpa_network(data, net)
    intermediate, optimize_intermediate, counts = ALPHA[stored]
    x, eps = jnp.asarray(data[f"bounds/{net}/x"][: counts[net]]), float(data[f"bounds/{net}/eps"])
    slopes = bj.optimized(
        steps=20,
        rule=optax.adam(optax.exponential_decay(0.5, 1, 0.9)),
        per_spec=True,
        optimize_intermediate=optimize_intermediate,
    )
    transform = bj.linear(function, slopes=slopes, intermediate=intermediate, max_bytes=2**28)
    bounds = jax.jit(jax.vmap(lambda x: transform(bj.LpBall(x, eps))))(x)
    lower, upper = (data[f"bounds/{net}/{stored}/{end}"][: counts[net]] for end in ("lb", "ub"))
    # No looser on average: after 20 steps two optimizers need not agree on every bound.
    assert bounds.width.mean() <= (upper - lower).mean()
    assert (bounds.lower >= lower - 1e-3).all()
    assert (bounds.upper <= upper + 1e-3).all()
