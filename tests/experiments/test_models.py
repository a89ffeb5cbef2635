import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import boundjax as bj
from boundjax.training import ibp_normal
from experiments import models
from experiments.methods.method import clean_pass
from experiments.models import table
from experiments.settings.config import ModelConfig
from experiments.settings.errors import ExperimentError

# From the papers' tables; those of the larger members of families from their formulas.
MNIST_PARAMETERS = {
    "mlp_2x100": 89_610,
    "small": 550_406,
    "small_valid": 329_606,
    "small_star": 166_406,
    "small_star_leaky": 166_406,
    "small_star_bn": 166_406 + 2 * (16 + 32 + 100),
    "medium": 1_974_762,
    "medium_valid": 893_418,
    "large": 13_257_290,
    "large_star": 13_220_362,
    "cnn7": 13_259_338,
    "wide_resnet": 17_615_434,
    "resnext": 13_677_706,
    "graddiv_mnist": 6_526_474,
    "family_a": 52_182,
    "family_b": 205_730,
    "family_c": 27_170,
    "family_d": 107_130,
    "family_e": 21_090,
    "family_f": 82_682,
    "family_g": 170_598,
    "family_h": 275_714,
    "family_i": 470_630,
    "family_j": 676_098,
    "three_layer_k3_w8_n512": 1_695_690,
    "three_layer_k5_w4_n512": 625_130,
    "three_layer_k5_w8_n512": 1_302_986,
    "three_layer_k5_w16_n512": 2_833_802,
    "four_layer_w4_n512": 1_096_442,
    "four_layer_w8_n512": 1_974_762,
    "four_layer_w16_n512": 3_881_930,
}
CIFAR_PARAMETERS = {
    "small": 730_118,
    "small_valid": 470_918,
    "small_star": 214_918,
    "medium": 2_466_858,
    "medium_valid": 1_188_906,
    "large": 17_190_602,
    "large_star": 17_153_674,
    "cnn7": 17_192_650,
    "6c2f": 2_250_378,
    "wrn": 4_214_850,
    "wide_resnet": 21_547_882,
    "resnext": 17_611_018,
    "vgg16": 14_728_266,
    "family_a": 67_670,
    "family_b": 267_426,
    "two_layer_w8_n128": 560_106,
    "two_layer_w16_n256": 2_234_314,
    "three_layer_k3_w8_n256": 1_136_394,
    "three_layer_k3_w16_n512": 4_537_866,
    "four_layer_w8_n256": 1_218_602,
    "four_layer_w8_n512": 2_466_858,
    "four_layer_w16_n256": 2_569_290,
    "four_layer_w16_n512": 4_866_122,
}
TINY_IMAGENET_PARAMETERS = {
    "8c2f": 4_342_984,
    "cnn7_tiny": 17_288_072 + 2 * (64 + 64 + 3 * 128 + 512),
    "wide_resnet_tiny": 91_424_776,
    "resnext_tiny": 16_981_960,
}
PARAMETERS = [
    *((name, (28, 28, 1), count) for name, count in MNIST_PARAMETERS.items()),
    *((name, (32, 32, 3), count) for name, count in CIFAR_PARAMETERS.items()),
    *((name, (64, 64, 3), count) for name, count in TINY_IMAGENET_PARAMETERS.items()),
    ("tiny", (8, 8, 1), 19_242),
    ("graddiv_stl10", (96, 96, 3), 2_166_282),
]

C = models.Convolution
# One small network for every kind of layer.
SMALL = {
    "pools": {
        "convolutions": (C(4, 3, 1, 1), models.Pool(2), C(6, 3, 1, 0), models.Pool(2, True)),
        "hidden": (5,),
        "negative_slope": 0.1,
        "mean": (0.4, 0.5),
        "std": (0.2, 0.3),
    },
    "batch_norm": {"convolutions": (C(4, 4, 2, 1),), "hidden": (8,), "batch_norm": True},
    "residual": {
        "convolutions": (C(4, 3, 1, 1),),
        "blocks": (
            models.Residual((C(6, 3, 2, 1), C(6, 3, 1, 1)), C(6, 1, 2, 0)),
            models.Block(4, halve=True),
        ),
        "hidden": (8,),
        "batch_norm": True,
    },
    "grouped": {
        "convolutions": (C(4, 3, 2, 1),),
        "blocks": (
            models.Residual(
                (C(6, 1, 1, 0), models.GroupedConvolution(6, 3, 1, 1, 2), C(4, 1, 1, 0)), None
            ),
        ),
        "batch_norm": True,
    },
}


def _small(name):
    """A network of `SMALL`, random parameters and statistics, images `[3, 8, 8, 2]`."""
    model = models.ConvolutionalClassifier(num_classes=3, **SMALL[name])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(3, 8, 8, 2)), jnp.float32)

    def random(leaf):
        if leaf.ndim > 1:
            value = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            value = rng.uniform(0.1, 1.3, leaf.shape)  # a scale or variance may not be negative
        return jnp.asarray(value, jnp.float32)

    return model, jax.tree.map(random, jax.eval_shape(model.init, jax.random.key(0), x)), x


@pytest.mark.parametrize(("name", "image_shape", "count"), PARAMETERS)
def test_parameter_counts(name, image_shape, count):
    assert models.count_parameters(models.create(name), image_shape) == count
    row = next(line for line in table.__doc__.splitlines() if line.startswith(f"{name} "))
    assert f"{count:,}" in row


def test_every_model_is_counted():
    assert set(models.MODELS) == {name for name, _, _ in PARAMETERS}
    assert set(models.MNIST_LARGE) <= set(MNIST_PARAMETERS)
    assert set(models.CIFAR_LARGE) <= set(CIFAR_PARAMETERS)


def test_unknown_models_are_errors():
    with pytest.raises(
        ExperimentError, match=r"unknown model 'resnet': use one of 6c2f, 8c2f, cnn7"
    ):
        models.create("resnet")


def test_images_too_small_for_the_pools_are_errors():
    with pytest.raises(ExperimentError, match=r"leave maps of shape \(0, 0, 512\): use larger"):
        models.count_parameters(models.create("vgg16"), (28, 28, 1))


def test_normalisation_is_the_first_layer():
    plain = models.create("tiny")
    normalised = models.create("tiny", mean=(0.5,), std=(0.25,))
    x = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))
    variables = plain.init(jax.random.key(1), x)
    np.testing.assert_allclose(
        normalised.apply(variables, x), plain.apply(variables, (x - 0.5) / 0.25), rtol=1e-6
    )


def test_a_block_adds_its_skip_before_the_last_relu():
    model = models.ConvolutionalClassifier(
        blocks=(models.Block(5), models.Block(3, halve=True)), num_classes=2
    )
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    params = model.init(jax.random.key(1), x)["params"]

    def convolved(x, index, stride, padding):
        layer = params[f"Conv_{index}"]
        padding = ((padding, padding),) * 2
        x = jax.lax.conv_general_dilated(
            x,
            layer["kernel"],
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x + layer["bias"].reshape(1, 1, 1, -1)

    y = convolved(jax.nn.relu(convolved(x, 0, 1, 1)), 1, 1, 1)
    y = jax.nn.relu(y + convolved(x, 2, 1, 0))
    z = convolved(jax.nn.relu(convolved(y, 3, 2, 1)), 4, 1, 1)
    z = jax.nn.relu(z + convolved(y, 5, 2, 0))
    assert z.shape == (2, 3, 3, 3)
    dense = params["Dense_0"]
    expected = z.reshape(2, -1) @ dense["kernel"] + dense["bias"][None]
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


def test_convolutions_may_start_by_their_outputs():
    image = jnp.zeros((1, 32, 32, 3))
    of = {
        init: models.from_config(ModelConfig(name="small_star", init=init)).init(
            jax.random.key(0), image
        )["params"]
        for init in ("fan_in", "fan_out")
    }
    # 32 filters of 4x4: the standard deviation is sqrt(2 / (16 * 32)), for any number of inputs.
    kernel = of["fan_out"]["Conv_1"]["kernel"]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / 512), rel=0.03)
    assert np.abs(kernel).max() > 2.5 * np.std(kernel)  # normal, neither uniform nor cut
    assert np.abs(of["fan_in"]["Conv_0"]["kernel"]).max() <= 1 / np.sqrt(48)
    for name in ("Dense_0", "Dense_1"):
        jax.tree.map(np.testing.assert_array_equal, of["fan_in"][name], of["fan_out"][name])


# Residual blocks, in which every convolution has a noise of its own, and a list of layers.
NOISY = {
    "blocks": {"convolutions": (C(4, 3, 1, 1),), "blocks": (models.Block(3, halve=True),)},
    "layers": {"convolutions": (C(4, 3, 1, 1), C(3, 4, 2, 1)), "hidden": (5,), "batch_norm": True},
}


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.sampled(3)
def test_noise_comes_before_every_convolution(name):
    """RSE: 0.2 on the image, 0.1 elsewhere; the noises are added to what convolutions take."""
    model = models.ConvolutionalClassifier(**NOISY[name], noise=(0.2, 0.1))
    x, key = jnp.full((1, 20, 20, 1), 0.5), jax.random.key(0)
    variables = model.init(key, x)
    plain = models.ConvolutionalClassifier(**NOISY[name])
    jax.tree.map(np.testing.assert_array_equal, variables, plain.init(key, x))
    inputs = []

    def intercept(call, arguments, options, context):
        if isinstance(context.module, nn.Conv):
            inputs.append(arguments[0])
        return call(*arguments, **options)

    with nn.intercept_methods(intercept):
        logits, recorded = model.apply(variables, x, rngs={"noise": key}, mutable=["draws"])
    noises = {name: layer["noise"] for name, layer in recorded["draws"].items()}
    assert len(noises) == len(inputs) == sum("Conv" in name for name in variables["params"])
    for index in range(len(noises)):
        expected = 0.2 if index == 0 else 0.1
        assert np.std(noises[f"GaussianNoise_{index}"]) == pytest.approx(expected, rel=0.25)
    np.testing.assert_array_equal(inputs[0], x + noises["GaussianNoise_0"])
    np.testing.assert_array_equal(model.apply({**variables, **recorded}, x), logits)


@pytest.mark.parametrize("name", NOISY)
def test_without_deviation_noise_changes_no_bit(name):
    x, key = jax.random.uniform(jax.random.key(3), (2, 8, 8, 1)), jax.random.key(0)
    plain = models.ConvolutionalClassifier(**NOISY[name])
    variables = plain.init(key, x)
    quiet = models.ConvolutionalClassifier(**NOISY[name], noise=(0.0, 0.0))
    for train in (False, True):
        results = [
            model.apply(variables, x, train, rngs={"noise": key}, mutable=["batch_stats"])
            for model in (plain, quiet)
        ]
        jax.tree.map(np.testing.assert_array_equal, *results)


def test_noise_is_no_layer_of_its_own():
    plain, noisy = (
        models.ConvolutionalClassifier(**NOISY["layers"], noise=noise)
        for noise in (None, (0.2, 0.1))
    )
    assert noisy.layer_count == plain.layer_count
    x, key = jnp.ones((1, 8, 8, 1)), {"noise": jax.random.key(1)}
    variables = noisy.init(jax.random.key(0), x)
    whole = noisy.apply(variables, x, rngs=key)
    for cut in range(noisy.layer_count):
        latent = noisy.apply(variables, x, rngs=key, stop=cut)
        np.testing.assert_array_equal(noisy.apply(variables, latent, rngs=key, start=cut), whole)


@pytest.mark.slow
def test_every_network_may_have_gaussian_weights():
    """Adv-BNN on a network with batch normalisation: a fixed draw is certified."""
    network = models.ConvolutionalClassifier(**NOISY["layers"])
    model = bj.stochastic.GaussianWeights(network, prior_std=0.1)
    x = jax.random.uniform(jax.random.key(3), (2, 8, 8, 1))
    pure = bj.PureModel.of((model, jax.jit(model.init)(jax.random.key(0), x)))
    certificate = bj.certify(pure.fixed_draw(jax.random.key(1), x), x, 1e-4, method="interval")
    assert certificate.arithmetic == "real"
    assert certificate.verified.all()


@pytest.mark.parametrize("inputs", [64, 784, 4096])
def test_ibp_kernels_neither_widen_nor_narrow_intervals(inputs):
    dense = ibp_normal()(jax.random.key(inputs), (inputs, 500))
    assert np.abs(dense).sum(0).mean() == pytest.approx(2.0, rel=0.02)
    assert np.abs(dense).max() > 3.5 * np.std(dense)  # normal, not cut
    convolution = ibp_normal(0.5)(jax.random.key(0), (4, 4, inputs // 16, 500))
    assert np.abs(convolution).sum((0, 1, 2)).mean() == pytest.approx(1.0, rel=0.02)


def test_ibp_initialization_halves_what_residual_sums_feed():
    def initial(init):
        model = models.ConvolutionalClassifier(
            convolutions=(C(16, 3, 1, 1),),
            blocks=(models.Block(16), models.Block(24, halve=True)),
            hidden=(50, 40),
            kernel_init=init,
        )
        return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]

    params, default = initial("ibp"), initial("fan_in")
    # Conv_0 | Conv_1, Conv_2, skip Conv_3 | Conv_4, Conv_5, skip Conv_6 | Dense_0, Dense_1, logits
    halved = ("Conv_4", "Conv_6", "Dense_0")
    for name in params:
        np.testing.assert_array_equal(params[name]["bias"], default[name]["bias"])
        if name == "Dense_2":
            np.testing.assert_array_equal(params[name]["kernel"], default[name]["kernel"])
            continue
        kernel = np.abs(np.asarray(params[name]["kernel"]))
        row_sum = kernel.reshape(-1, kernel.shape[-1]).sum(0).mean()
        # |w| of a normal weight has a standard deviation of 0.76 means.
        error = 4 * 0.76 / np.sqrt(kernel.size)
        assert row_sum == pytest.approx(1.0 if name in halved else 2.0, rel=error), name


def test_unknown_initializations_are_errors():
    with pytest.raises(ExperimentError, match="one of fan_in, fan_out, ibp, got 'orthogonal'"):
        models.count_parameters(models.create("tiny", kernel_init="orthogonal"), (8, 8, 1))


# ------------------------------------------------------------------ parts


def test_parameters_have_the_names_and_values_that_flax_gives():
    class Automatic(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
            for filters in (4, 6):
                x = nn.Conv(filters, (3, 3), padding=((1, 1), (1, 1)), kernel_init=init)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = nn.Dense(5, kernel_init=init)(x.reshape(x.shape[0], -1))
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            return nn.Dense(3, kernel_init=init)(x)

    model = models.ConvolutionalClassifier(
        convolutions=(C(4, 3, 1, 1), C(6, 3, 1, 1)), hidden=(5,), num_classes=3, batch_norm=True
    )
    x = jnp.zeros((1, 8, 8, 2))
    expected, result = (m.init(jax.random.key(5), x) for m in (Automatic(), model))
    jax.tree.map(np.testing.assert_array_equal, expected, result)


def test_layers_are_counted_as_in_ctbench():
    assert models.create("cnn7").layer_count == 21
    assert models.create("large").layer_count == 15
    assert models.create("mlp_2x100").layer_count == 7


@pytest.mark.parametrize("name", ["pools", "batch_norm"])
def test_any_two_parts_are_the_network(name):
    model, variables, x = _small(name)
    whole = model.apply(variables, x)
    for k in range(model.layer_count + 1):
        latent = model.apply(variables, x, stop=k)
        np.testing.assert_array_equal(model.apply(variables, latent, start=k), whole)
    # In both networks the second layer is the first convolution, and a ReLU is before the logits.
    assert model.apply(variables, x, stop=2).shape[-1] == 4
    last = model.apply(variables, x, stop=model.layer_count - 1)
    assert last.shape == (3, model.hidden[-1])
    if model.mean is not None:
        expected = (np.asarray(x) - np.asarray(model.mean)) / np.asarray(model.std)
        np.testing.assert_allclose(model.apply(variables, x, stop=1), expected, rtol=1e-4)
    else:
        np.testing.assert_array_equal(model.apply(variables, x, stop=1), x)


def test_the_bounds_of_parts_are_those_of_the_network():
    model, variables, x = _small("batch_norm")

    def part(start, stop):
        return bj.interval(lambda z: model.apply(variables, z[None], start=start, stop=stop)[0])

    box = bj.Box(x[0] - 0.1, x[0] + 0.1)
    latent = part(0, 4)(box)
    bounds, expected = part(4, None)(bj.Box(latent.lower, latent.upper)), part(0, None)(box)
    np.testing.assert_allclose(bounds.lower, expected.lower, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bounds.upper, expected.upper, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("start", "stop"), [(-1, None), (3, 2), (0, 10), (10, None), (0, -1)])
def test_parts_that_are_not_there_are_errors(start, stop):
    model, variables, x = _small("batch_norm")
    assert model.layer_count == 9
    with pytest.raises(ValueError, match=rf"of 9 layers, .* got start={start}, stop={stop}"):
        model.apply(variables, x, start=start, stop=stop)


def test_residual_networks_have_no_parts():
    model, variables, x = _small("residual")
    with pytest.raises(ValueError, match="apply it as a whole, got start=1, stop=None"):
        model.apply(variables, x, start=1)
    with pytest.raises(ValueError, match="not a list of layers to count"):
        _ = model.layer_count


# ------------------------------------------------------------------ bounds


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.sampled(3)
def test_every_kind_of_layer_can_be_bounded(name):
    model, variables, x = _small(name)

    def bounds(transform):
        def apply(variables, x):
            return transform(lambda z: model.apply(variables, z[None])[0])(bj.LpBall(x, eps=0.1))

        return jax.eval_shape(apply, variables, x[0])

    assert bounds(bj.interval).lower.shape == (3,)
    assert bounds(bj.linear).upper.shape == (3,)


def test_bounds_of_a_residual_network_hold():
    model, variables, x = _small("residual")
    eps = 0.001  # units are unstable in the last block only

    @jax.jit
    def bounds_and_values(variables, x, noise):
        def function(z):
            return model.apply(variables, z[None])[0]

        ball = bj.LpBall(x, eps=eps)
        steepest = eps * jnp.sign(jax.jacrev(function)(x))
        samples = x[None] + jnp.concatenate([noise, steepest, -steepest])
        return (
            bj.interval(function)(ball),
            bj.linear(function)(ball),
            model.apply(variables, samples),
        )

    noise = np.random.default_rng(0).uniform(-eps, eps, (100, 8, 8, 2))
    interval, linear, values = bounds_and_values(variables, x[0], jnp.asarray(noise, jnp.float32))
    for bounds in (interval, linear):
        assert np.all(bounds.lower[None] <= values + 2e-6)
        assert np.all(values - 2e-6 <= bounds.upper[None])
    # The corners of the gradients reach far enough to meet a bound that is too tight.
    assert np.all(np.ptp(values, axis=0) > 0.2 * (linear.upper - linear.lower))


# ------------------------------------------------------------------ batch statistics


def test_the_clean_pass_normalises_blocks():
    model, variables, x = _small("residual")
    params, running = variables["params"], variables["batch_stats"]
    logits, statistics = clean_pass(model, params, running, x)
    # Stem, two convolutions and skip of two blocks, hidden layer.
    assert set(statistics) == {f"BatchNorm_{i}" for i in range(8)}
    bounded = model.apply({"params": params, "batch_stats": statistics}, x)
    np.testing.assert_allclose(bounded, logits, rtol=1e-3, atol=1e-4)


def _batch_normalised():
    model = models.ConvolutionalClassifier(
        convolutions=(models.Convolution(4, 3, 1, 1),), hidden=(8,), batch_norm=True
    )
    x = jax.random.uniform(jax.random.key(0), (16, 6, 6, 1))
    variables = model.init(jax.random.key(1), x)
    return model, variables["params"], variables["batch_stats"], x


def test_the_clean_pass_returns_the_statistics_of_the_batch():
    model, params, running, x = _batch_normalised()
    logits, statistics = clean_pass(model, params, running, x)
    convolved = jax.lax.conv_general_dilated(
        x,
        params["Conv_0"]["kernel"],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    result = statistics["BatchNorm_0"]
    mean = np.mean(convolved + params["Conv_0"]["bias"].reshape(1, 1, 1, -1), axis=(0, 1, 2))
    np.testing.assert_allclose(result["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result["var"], np.var(convolved, axis=(0, 1, 2)), rtol=1e-3)
    # The eval-mode model with these statistics is the train-mode model.
    bounded = model.apply({"params": params, "batch_stats": statistics}, x)
    np.testing.assert_allclose(bounded, logits, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_statistics():
    model, params, running, x = _batch_normalised()

    def variance(params):
        return jnp.sum(clean_pass(model, params, running, x)[1]["BatchNorm_0"]["var"])

    gradient = jax.grad(variance)(params)["Conv_0"]["kernel"]
    assert np.all(np.isfinite(gradient))
    assert np.any(np.abs(gradient) > 0)
