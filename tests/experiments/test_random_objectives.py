"""Objectives of random networks: values in NumPy, gradients by differences, sigma 0, schedules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_random as plain
import pytest

from boundjax import attacks, training
from experiments import methods, models
from experiments.methods.method import Batch, Coefficients
from experiments.methods.random import attacked, gradient_measures
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError
from experiments.train.step import create_schedule

IMAGE, CLASSES, IMAGES = (2, 2, 1), 3, 1000
# A convolution over the whole image and one of one pixel are dense layers.
NETWORK = {
    "convolutions": (models.Convolution(5, 2, 1, 0), models.Convolution(4, 1, 1, 0)),
    "num_classes": CLASSES,
    "negative_slope": 0.1,
}
WEIGHTS = Coefficients(eps=0.2, kappa=0.3, beta=0.6, ramp=0.4)
ATTACK = {"adversary": {"steps": 2, "step_size": 0.4, "scale": 1.2}}
GAUSSIAN = {"random": {"prior_std": 0.3, "initial_std": 0.4, "kl": 0.2}}
NOISE = {"random": {"noise": (0.3, 0.2)}}


def _diverse(measure, **changed):
    return {"diversity": {"weight": 0.7, "measure": measure} | changed}


CASES = {
    "rse": ("rse", NOISE),
    "rse, kappa": ("rse", NOISE | _diverse("kappa")),
    "adv-train": ("adv-train", {}),
    "adv-train, noise": ("adv-train", NOISE),
    "adv-train, noise, dpp": ("adv-train", NOISE | _diverse("dpp")),
    "adv-train, weights": ("adv-train", GAUSSIAN),
    "adv-bnn": ("adv-bnn", GAUSSIAN),
    "adv-bnn, kappa": ("adv-bnn", GAUSSIAN | _diverse("kappa")),
    "adv-bnn, mean": ("adv-bnn", GAUSSIAN | _diverse("mean", draws=4)),
    "adv-bnn, dpp, clean": ("adv-bnn", GAUSSIAN | _diverse("dpp", at="clean")),
    "adv-bnn, max": ("adv-bnn", GAUSSIAN | _diverse("max")),
    "adv-bnn, smoothmax": ("adv-bnn", GAUSSIAN | _diverse("smoothmax", draws=2)),
}


@pytest.fixture(autouse=True)
def _tiny_network(monkeypatch):
    monkeypatch.setitem(models.MODELS, "test_random", NETWORK)


def test_every_random_method_is_tried():
    names = {name for name, method in methods.METHODS.items() if method.draws != "none"}
    assert {name for name, _ in CASES.values()} == names


def _config(method, groups, **robust):
    return from_config_dict(
        ATTACK | groups | {"model": {"name": "test_random"}, "robust": {"method": method} | robust}
    )


def _layers(network):
    """`Conv_0`, `Conv_1` and `Dense_0` as matrices."""
    layers = [network[name] for name in ("Conv_0", "Conv_1", "Dense_0")]
    return [
        (np.asarray(v["kernel"]).reshape(-1, v["bias"].size).T, np.asarray(v["bias"]))
        for v in layers
    ]


def _draw(model, config, params, key):
    """The pass of a key. What the layers draw is recorded, at mean 0 and deviation 1."""
    x = jnp.zeros((1, *IMAGE))
    if config.random.prior_std:
        mean, log_std = (params["network"][part] for part in ("mean", "log_std"))
        standard = {"network": jax.tree.map(jnp.zeros_like, {"mean": mean, "log_std": log_std})}
        _, drawn = model.apply({"params": standard}, x, rngs={"noise": key}, mutable=["draws"])
        xi = _layers(drawn["draws"]["weights"])
        layers = plain.gaussian(_layers(mean), _layers(log_std), xi)
        return plain.Draw(layers, [0.0] * 3, 0.1)
    noises = [0.0] * 3
    if config.random.noise:
        _, drawn = model.apply({"params": params}, x, rngs={"noise": key}, mutable=["draws"])
        draws = drawn["draws"]
        noises[:2] = (np.ravel(draws[f"GaussianNoise_{i}"]["noise"]) for i in range(2))
    return plain.Draw(_layers(params), noises, 0.1)


def _expected(model, config, batch, key, params, points=None):
    """The loss, and the images that it is taken at."""
    draw_of = functools.partial(_draw, model, config, params)
    attack_key, draw_key, diversity_key = jax.random.split(key, 3)
    images, labels = (np.asarray(part) for part in batch)
    images = images.reshape(len(images), -1)
    if points is None and config.robust.method != "rse":
        eps = 1.2 * WEIGHTS.eps
        keys = jax.random.fold_in(jax.random.fold_in(attack_key, 0x454F54), 0)
        steps = [jax.random.split(k, 1)[0] for k in jax.random.split(keys, 3)[:2]]
        draws = [draw_of(step) for step in steps]
        points = [
            plain.attacked(*each, eps, 0.4 * eps, draws)
            for each in zip(images, labels, strict=True)
        ]
    points = images if points is None else points
    draw = draw_of(draw_key)
    loss = np.mean([plain.ce(draw.logits(x), y) for x, y in zip(points, labels, strict=True)])
    if config.robust.method == "adv-bnn":
        mean, log_std = (_layers(params["network"][part]) for part in ("mean", "log_std"))
        loss += 0.2 / IMAGES * plain.kl(mean, log_std, 0.3)
    if config.diversity.weight:
        draws = [draw_of(k) for k in jax.random.split(diversity_key, config.diversity.draws)]
        at = points if config.diversity.at == "attacked" else images
        values = [
            plain.measure(np.stack([d.gradient(x, y) for d in draws]), config.diversity.measure)
            for x, y in zip(at, labels, strict=True)
        ]
        loss += 0.4 * 0.7 * np.mean(values)
    return loss, points


# One draw costs seconds of compilation: the others run every night.
EVERY_TIME = ("rse", "adv-bnn, kappa")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.slow) for name in CASES],
)
def test_an_objective_is_what_numpy_says_and_so_is_its_gradient(name):
    config = _config(*CASES[name])
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        model = models.from_config(config.model, config.random)
        batch = Batch(jnp.asarray(rng.uniform(size=(4, *IMAGE))), jnp.asarray([0, 1, 2, 0]))
        params = model.init(jax.random.key(5), jnp.zeros((1, *IMAGE), jnp.float32))["params"]
        params = jax.tree.map(
            lambda p: np.asarray(p, float) + 0.3 * rng.normal(size=p.shape), params
        )
        direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
        method, key = methods.create(model, config, images=IMAGES), jax.random.key(2)
        weights = Coefficients(*map(jnp.float64, WEIGHTS))
        objective = method.objectives[int(method.phase(weights))]

        @jax.jit
        def run(params):
            return jax.value_and_grad(objective, has_aux=True)(
                params, {"batch_stats": {}}, batch, weights, key
            )

        expected = functools.partial(_expected, model, config, batch, key)
        (value, outcome), gradient = run(params)
        loss, points = expected(params)
        assert float(value) == pytest.approx(loss, rel=1e-9)
        assert float(outcome.metrics["loss"]) == float(value)
        assert float(outcome.metrics["verified_error"]) == 1.0  # nothing is certified
        ends = [
            expected(jax.tree.map(lambda p, d, s=step: p + s * d, params, direction), points)[0]
            for step in (1e-6, -1e-6)
        ]
        slopes = jax.tree.map(lambda g, d: float(jnp.sum(g * d)), gradient, direction)
        slope = sum(jax.tree.leaves(slopes))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


@pytest.mark.slow
def test_measures_of_a_step_are_those_of_its_objective():
    config = _config("adv-bnn", GAUSSIAN | _diverse("mean"))
    model = models.from_config(config.model, config.random)
    images = jax.random.uniform(jax.random.key(0), (4, *IMAGE))
    batch, key = Batch(images, jnp.asarray([0, 1, 2, 0])), jax.random.key(2)
    params = model.init(jax.random.key(1), images)["params"]
    method = methods.create(model, config, images=IMAGES)
    weights = Coefficients(*map(jnp.float32, WEIGHTS))

    @jax.jit
    def run(params):
        setting = methods.Setting(model, config)
        measures = gradient_measures(setting, {"params": params}, batch, weights.eps, key)
        losses = [o(params, {"batch_stats": {}}, batch, weights, key)[0] for o in method.objectives]
        return measures, losses

    measures, (without, loss) = run(params)
    assert float(loss - without) == pytest.approx(0.4 * 0.7 * float(measures["mean"]), rel=1e-4)
    # rho^2 = (1 + (n - 1) R_mean) / n, example by example.
    assert measures["rho"] ** 2 <= (1 + 2 * measures["mean"]) / 3 + 1e-6
    assert measures["dpp"] > 0


# ------------------------------------------------------------------------------ sigma 0


def _outcome(method, groups, params, batch, key=None):
    config = _config(method, groups)
    model = models.from_config(config.model, config.random)
    method = methods.create(model, config, images=IMAGES)
    weights = Coefficients(*map(jnp.float32, WEIGHTS))
    objective = method.objectives[int(method.phase(weights))]
    key = jax.random.key(2) if key is None else key
    return jax.jit(jax.value_and_grad(objective, has_aux=True))(
        params, {"batch_stats": {}}, batch, weights, key
    )


@pytest.fixture(scope="module")
def deterministic():
    """Parameters of the network without randomness, and a batch."""
    images = jax.random.uniform(jax.random.key(0), (4, *IMAGE))
    batch = Batch(images, jnp.asarray([0, 1, 2, 0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_random", NETWORK)
        params = models.create("test_random").init(jax.random.key(1), images)["params"]
    return params, batch


def test_adversarial_training_of_a_deterministic_network_is_pgd_training(deterministic):
    """Bit for bit that of `pgd`, which keeps the last iterate, and the cross-entropy."""
    params, batch = deterministic
    model = models.create("test_random")
    eps = jnp.float32(1.2) * jnp.float32(WEIGHTS.eps)

    def loss(params):
        def f(x):
            return model.apply({"params": params}, x)

        points = attacks.pgd(
            f, *batch, eps, key=jax.random.key(9), clip=(0.0, 1.0), steps=2, step_size=0.4 * eps,
            loss="cross_entropy", keep="last",
        )  # fmt: skip
        return jnp.mean(training.cross_entropy(f(jax.lax.stop_gradient(points)), batch.labels))

    expected, direction = jax.jit(jax.value_and_grad(loss))(params)
    (value, _), gradient = _outcome("adv-train", {}, params, batch)
    assert value == expected
    jax.tree.map(np.testing.assert_array_equal, gradient, direction)


@pytest.mark.parametrize("method", ["adv-train", "rse"])
def test_noise_of_deviation_0_changes_nothing(method, deterministic):
    params, batch = deterministic
    plain_method = "natural" if method == "rse" else method
    (expected, _), direction = _outcome(plain_method, {}, params, batch)
    silent = {"random": {"noise": (0.0, 0.0)}}
    (value, _), gradient = _outcome(method, silent, params, batch)
    assert value == expected
    jax.tree.map(np.testing.assert_array_equal, gradient, direction)


def test_weights_of_deviation_0_are_their_means(deterministic):
    params, batch = deterministic
    (expected, _), direction = _outcome("adv-train", {}, params, batch)
    log_std = jax.tree.map(lambda p: jnp.full_like(p, -jnp.inf), params)
    stored = {"network": {"mean": params, "log_std": log_std}}
    (value, _), gradient = _outcome("adv-train", GAUSSIAN, stored, batch)
    assert value == expected
    jax.tree.map(np.testing.assert_array_equal, gradient["network"]["mean"], direction)
    for leaf in jax.tree.leaves(gradient["network"]["log_std"]):
        np.testing.assert_array_equal(leaf, 0.0)


def test_the_attack_is_pgd_over_draws(deterministic):
    """Unrolled, with one draw per step, it follows the keys of `attacks.pgd`."""
    _, batch = deterministic
    config = _config("adv-bnn", GAUSSIAN)
    model = models.from_config(config.model, config.random)
    variables = model.init(jax.random.key(1), batch.images)
    setting = methods.Setting(model, config)
    attack = jax.jit(lambda key: attacked(setting, variables, batch, jnp.float32(0.2), key))
    ours = attack(jax.random.key(4))
    eps = jnp.float32(1.2) * jnp.float32(0.2)

    def f(x, key):
        return model.apply(variables, x, rngs={"noise": key})

    points = attacks.pgd(
        f, *batch, eps, key=jax.random.key(4), clip=(0.0, 1.0), steps=2, step_size=0.4 * eps,
        loss="cross_entropy", draws=1,
    )  # fmt: skip
    np.testing.assert_allclose(ours, points, atol=1e-6)
    assert (ours != attack(jax.random.key(5))).any()


# ------------------------------------------------------------------------------ schedules, refusals


def test_the_weight_of_graddiv_is_0_in_the_warm_up_and_then_grows():
    config = _config(
        "adv-bnn", GAUSSIAN | _diverse("mean") | {"train": {"epochs": 6}},
        eps_train=0.3, schedule="constant", warmup_epochs=1.0, ramp_epochs=4.0,
    )  # fmt: skip
    schedule = create_schedule(config.robust, steps_per_epoch=10)
    coefficients = [schedule(step) for step in (0, 10, 20, 50, 59)]
    assert all(float(each.eps) == np.float32(0.3) for each in coefficients)
    np.testing.assert_allclose([each.ramp for each in coefficients], [0, 0, 0.25, 1, 1])
    method = methods.create(models.from_config(config.model, config.random), config)
    assert [int(method.phase(each)) for each in coefficients] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("method", "groups", "message"),
    [
        ("ibp", GAUSSIAN, r"'ibp' trains deterministic networks, .* use one of adv-train, adv-b"),
        ("natural", NOISE, r"'natural' trains deterministic networks, got a random one"),
        ("rse", {}, r"'rse' needs random\.noise, such as \(0\.2, 0\.1\)"),
        ("rse", {"random": {"prior_std": 0.1}}, r"'rse' needs random\.noise"),
        ("adv-bnn", NOISE, r"'adv-bnn' needs random weights: set random\.prior_std"),
        ("adv-train", _diverse("mean"), r"diversity\.weight=0\.7 needs a random network"),
        ("rse", {"random": {"noise": (0.0, 0.0)}} | _diverse("mean"), r"needs a random network"),
        ("adv-bnn", GAUSSIAN | {"data": {"validation": 9}}, r"data\.validation is for networks"),
        ("adv-bnn", GAUSSIAN | {"evaluation": {"precise_bn": True}}, r"config\.evaluation\.prec"),
        ("adv-bnn", GAUSSIAN | {"regularizers": {"l1": 0.1}}, r"regularizers\.l1 needs a method"),
    ],
)
def test_networks_that_a_method_has_nothing_to_do_with(method, groups, message):
    with pytest.raises(ExperimentError, match=message) as caught:
        methods.create(None, _config(method, groups))
    assert "\n" not in str(caught.value)


def test_random_networks_that_there_are_not():
    noisy = from_config_dict({"model": {"name": "mlp_2x100"}} | NOISE)
    with pytest.raises(ExperimentError, match=r"before convolutions, and 'mlp_2x100' has none"):
        models.from_config(noisy.model, noisy.random)
    gaussian = from_config_dict({"model": {"name": "tiny", "init": "ibp"}} | GAUSSIAN)
    with pytest.raises(ExperimentError, match=r"prior_std needs config\.model\.init='fan_in'"):
        models.from_config(gaussian.model, gaussian.random)
