import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
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
    assert set(models.MODELS) == {*MNIST_PARAMETERS, "tiny"}
    assert models.count_parameters(models.create("tiny"), (8, 8, 1)) == 19_242


def test_unknown_models_are_errors():
    with pytest.raises(ExperimentError, match=r"unknown model 'resnet': use one of cnn7, family_a"):
        models.create("resnet")


def test_normalisation_is_the_first_layer():
    plain = models.create("tiny")
    normalised = models.create("tiny", mean=(0.5,), std=(0.25,))
    x = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))
    variables = plain.init(jax.random.key(1), x)
    np.testing.assert_allclose(
        normalised.apply(variables, x), plain.apply(variables, (x - 0.5) / 0.25), rtol=1e-6
    )


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
