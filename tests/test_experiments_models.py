import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.config import ModelConfig
from experiments.errors import ExperimentError
from experiments.methods.method import clean_pass

# From the papers' tables.
MNIST_PARAMETERS = {
    "mlp_2x100": 89_610,
    "small": 550_406,
    "small_star": 166_406,
    "medium": 1_974_762,
    "large": 13_257_290,
    "cnn7": 13_259_338,
    "family_a": 52_182,
    "family_b": 205_730,
}
CIFAR_PARAMETERS = {
    "small": 730_118,
    "small_star": 214_918,
    "medium": 2_466_858,
    "large": 17_190_602,
    "cnn7": 17_192_650,
    "6c2f": 2_250_378,
    "wrn": 4_214_850,
    "family_a": 67_670,
    "family_b": 267_426,
}


@pytest.mark.parametrize(("name", "count"), MNIST_PARAMETERS.items())
def test_parameter_counts_on_mnist(name, count):
    assert models.count_parameters(models.create(name), (28, 28, 1)) == count


@pytest.mark.parametrize(("name", "count"), CIFAR_PARAMETERS.items())
def test_parameter_counts_on_cifar(name, count):
    assert models.count_parameters(models.create(name), (32, 32, 3)) == count


def test_every_model_is_counted():
    assert set(models.MODELS) == {*MNIST_PARAMETERS, *CIFAR_PARAMETERS, "tiny", "8c2f"}
    assert models.count_parameters(models.create("8c2f"), (64, 64, 3)) == 4_342_984
    assert models.count_parameters(models.create("tiny"), (8, 8, 1)) == 19_242


def test_unknown_models_are_errors():
    with pytest.raises(
        ExperimentError, match=r"unknown model 'resnet': use one of 6c2f, 8c2f, cnn7"
    ):
        models.create("resnet")


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
    found = statistics["BatchNorm_0"]
    mean = np.mean(convolved + params["Conv_0"]["bias"].reshape(1, 1, 1, -1), axis=(0, 1, 2))
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["var"], np.var(convolved, axis=(0, 1, 2)), rtol=1e-3)
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
