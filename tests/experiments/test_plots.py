"""Figures of runs: each command on a tiny run, and the numbers that the figures show."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from experiments import models
from experiments.data import Images
from experiments.plots import (
    curves,
    ellipse,
    figure,
    learning_curve,
    margins,
    norms,
    records,
    relaxations,
    relus,
    slope_shares,
    smoothness,
    surface,
    tightness,
    trade_off,
    verified_error,
    warmup,
    widths,
)
from experiments.run import run as runs
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError

# The finished runs are made once.
one_worker = pytest.mark.xdist_group("plots")
IMAGE = (8, 8, 1)


@pytest.fixture(scope="module", autouse=True)
def _tiny_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_mlp", {"hidden": (8,)})
        yield


def _config(method, diagnostics, norm="inf", **robust):
    return from_config_dict(
        {
            "data": {"name": "digits"},
            "model": {"name": "test_mlp"},
            "train": {
                "epochs": 2,
                "batch_size": 256,
                "diagnostics": diagnostics,
                "diagnostics_every": 2,
            },
            "optim": {"lr": 5e-3},
            "robust": {
                "method": method,
                "norm": norm,
                "eps_train": 0.03,
                "eps_test": 0.02,
                "warmup_epochs": 0.2,
                "ramp_epochs": 1.0,
                "kappa": (0.0, 0.0),
                "beta": (1.0, 1.0),
                **robust,
            },
            "evaluation": {
                "pgd_steps": 1,
                "pgd_restarts": 1,
                "methods": ("interval",) if norm == "inf" else ("lmt",),
                "rounding": "nearest",
            },
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one step and one of BCP, by their methods."""
    folder = tmp_path_factory.mktemp("plots")
    configs = {
        "one-step": _config("one-step", ("landscape", "relaxation", "relus")),
        "bcp": _config("bcp", ("norms",), norm="2"),
    }
    for name, config in configs.items():
        runs.run(config, folder / name, "test")
    return {name: folder / name for name in configs}


LINF = {
    "learning_curve": (learning_curve, ["--radius=target", "--epochs", "0", "2"]),
    "smoothness": (smoothness, ["--radius=target"]),
    "relus": (relus, []),
    "slopes": (relus, ["--kind=slopes"]),
    "warmup": (warmup, []),
    "trade_off": (trade_off, []),
    "verified_error": (verified_error, ["--count=20"]),
    "widths": (widths, ["--count=20"]),
    "surface": (surface, ["--count=20", "--points=3", "--loss=crown-ibp"]),
    "tightness": (tightness, ["--count=20", "--loss"]),
}


DAILY = ("learning_curve", "relus", "tightness")


@one_worker
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in DAILY else pytest.mark.slow) for n in LINF]
)
def test_the_command_of_a_figure(name, finished, tmp_path, capsys):
    module, flags = LINF[name]
    out = tmp_path / f"{name}.png"
    module.main([str(finished["one-step"])] * 2 + [f"--out={out}", *flags])
    assert f"figure: {out}" in capsys.readouterr().out
    assert 3_000 < out.stat().st_size < 400_000


@one_worker
def test_figures_are_written_to_the_run(finished, capsys):
    slope_shares.main([str(finished["one-step"])])
    norms.main([str(finished["bcp"])])
    ellipse.main([str(finished["bcp"]), "--image=3"])
    printed = capsys.readouterr().out
    for path in (
        finished["one-step"] / "slope_shares.png",
        finished["bcp"] / "norms.png",
        finished["bcp"] / "ellipse.png",
    ):
        assert f"figure: {path}" in printed
        assert path.stat().st_size > 3_000


@one_worker
@pytest.mark.parametrize(
    ("module", "run", "message"),
    [
        (slope_shares, "bcp", r"has recorded no 'relaxation'; train with .*\('relaxation',\)"),
        (smoothness, "bcp", r"has recorded no 'landscape'; train with .*\('landscape',\)"),
        (norms, "one-step", r"has recorded no 'norms'; train with"),
    ],
)
def test_a_run_without_the_measures_is_refused_in_one_line(module, run, message, finished, capsys):
    with pytest.raises(SystemExit) as caught:
        module.main([str(finished[run])])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert finished[run].name in error
    with pytest.raises(ExperimentError, match=message):
        records.need(
            records.read(finished[run]),
            {slope_shares: "relaxation", smoothness: "landscape", norms: "norms"}[module],
        )


@one_worker
def test_the_lines_of_an_ellipse_are_the_bounds(finished):
    network = margins.load(finished["bcp"], 5)
    outline = ellipse.outline_of(network, 3)
    assert outline.lmt <= outline.bcp <= outline.center[0] - outline.center[1]
    # The line of LMT touches the ellipse.
    assert np.min(outline.ellipse @ [1, -1]) == pytest.approx(outline.lmt, abs=1e-3)
    for at in outline.attacked.values():
        assert at[0] - at[1] >= outline.bcp
    network = network._replace(threat=bj.Threat(0.02, np.inf, (0.0, 1.0)))
    with pytest.raises(ExperimentError, match="the figure needs a run in l2"):
        ellipse.outline_of(network, 3)


@one_worker
def test_records_are_those_of_the_file(finished):
    run = records.read(finished["one-step"])
    assert run.name == "one step"
    assert run.ramp == (0.2, 1.2)
    lines = [json.loads(line) for line in (run.path / "landscape.jsonl").read_text().splitlines()]
    epochs, values = records.series(run, "target", "variation")
    assert epochs == [line["step"] / 5 for line in lines]
    assert values == [line["target"]["variation"] for line in lines]
    # The natural phase has no bounds.
    assert len(records.series(run, "relus", "tightness")[0]) < len(lines)
    assert [epoch for epoch, _ in zip(*records.over_epochs(run, "loss"), strict=True)] == [1, 2]


@one_worker
def test_the_means_are_those_of_the_second_half_of_the_ramp(finished):
    run = records.read(finished["one-step"])
    means = smoothness.ramp_means(run)
    # The ramp is in epochs 0.2 to 1.2, of 5 steps: steps 4 and 6 are measured in its second half.
    lines = [line for line in run.landscape if line["step"] in (4, 6)]
    assert means["lines"] == len(lines) == 2
    for key in ("variation", "gradient_difference"):
        expected = sum(line["landscape"][key] for line in lines) / 2
        assert means[key] == pytest.approx(expected)
    zero = sum(line["relaxation"]["slopes"]["zero"] for line in lines) / 2
    assert means["nonzero"] == pytest.approx(1 - zero)


def test_a_running_median_ignores_a_peak():
    assert records.running_median([1.0, 1.0, 9.0, 1.0, 1.0], 3) == [1.0] * 5
    assert records.running_median([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"robust": {"method": "ibp"}}, "IBP"),
        ({"robust": {"method": "pq-slopes"}, "relaxation": {"p": 0.5, "q": 1.0}}, "(0.5, 1)"),
        ({"robust": {"method": "ibp"}, "regularizers": {"relu_stability": 10.0}}, "IBP, RS 10"),
    ],
)
def test_methods_have_the_names_of_the_papers(settings, name):
    assert records.method_name(from_config_dict(settings)) == name


@one_worker
def test_mistakes_on_the_command_line(finished, tmp_path, capsys):
    run = str(finished["one-step"])
    for arguments, message in (
        ([run, "--count=0"], "--count must be an integer >= 1, got 0"),
        ([run, "--loss=no"], "invalid choice: 'no'"),
        ([run, f"--out={tmp_path / 'a.jpg'}"], "must be a PNG file in an existing folder"),
        ([str(tmp_path)], "holds no run"),
        ([run, str(finished["bcp"])], "in one norm"),
    ):
        module = verified_error if arguments[-1] == str(finished["bcp"]) else surface
        with pytest.raises(SystemExit) as caught:
            module.main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_a_name_keeps_its_colour():
    palette = figure.colours(["IBP", "CAP", "IBP"])
    assert palette == {"IBP": "C0", "CAP": "C1"}


# ------------------------------------------------------------------ what the figures show


@pytest.mark.parametrize("panel", relaxations.PANELS, ids=lambda panel: panel.title)
def test_the_lines_drawn_enclose_the_relu(panel):
    lower, upper = relaxations.lines(panel)
    x = np.linspace(panel.lower, panel.upper, 201)
    value = np.maximum(x, 0)
    assert np.all(np.polyval(lower, x) <= value + 1e-6)
    assert np.all(np.polyval(upper, x) >= value - 1e-6)
    if "CAP" in panel.title:
        assert lower[0] == pytest.approx(upper[0]) == pytest.approx(0.6)
    if "IBP, unstable" in panel.title:
        assert (lower[0], upper[0]) == (0, 0)
    if "one step" in panel.title:
        assert lower == pytest.approx([0.35, 0], abs=1e-6)


def test_the_command_that_draws_relaxations(tmp_path):
    relaxations.main([f"--out={tmp_path / 'r.png'}"])
    assert (tmp_path / "r.png").stat().st_size > 3_000


@pytest.fixture(scope="module")
def network():
    """An untrained network and random images."""
    model = models.create("test_mlp")
    images = np.random.default_rng(0).uniform(size=(6, *IMAGE)).astype(np.float32)
    pure = bj.PureModel.of((model, model.init(jax.random.key(0), jnp.asarray(images))))
    logits = pure.apply(pure.variables, jnp.asarray(images))
    labels = np.argmax(np.asarray(logits), axis=-1).astype(np.int32)
    config = from_config_dict(
        {"evaluation": {"methods": ("interval", "crown-ibp"), "rounding": "nearest"}}
    )
    return margins.Network(
        config, pure, Images(images, labels), bj.Threat(0.02, np.inf, (0.0, 1.0)), "test"
    )


@pytest.mark.slow
def test_the_middle_of_a_surface_is_the_loss_of_the_network(network):
    pure, data, threat = network.pure, network.data, network.threat
    measured = surface.surface_of(pure, data, threat, "interval", points=3, reach=0.1)
    losses = tightness.measure(pure, data, threat).losses["IBP"]
    assert measured.losses[1, 1] == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert measured.losses.shape == (3, 3)
    assert len(set(measured.losses.ravel())) == 9


def test_a_direction_has_the_norms_of_the_weights():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 4)).astype(np.float32)
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.ones(4)}
    direction = surface.directions(params, jax.random.key(0))
    norm = np.sqrt(np.sum(np.square(direction["kernel"]), axis=(0, 1, 2)))
    np.testing.assert_allclose(norm, np.sqrt(np.sum(kernel**2, axis=(0, 1, 2))), rtol=1e-5)
    assert np.all(np.asarray(direction["bias"]) == 0)


def test_the_verified_error_never_falls_and_is_that_of_certify(network):
    radii = verified_error.radii_of(network, 2.0)
    eps = np.linspace(0, 0.04, 21)
    errors = verified_error.error_at(radii, eps)
    assert errors[0] == radii.clean == 0
    assert np.all(np.diff(errors) >= 0)
    data = network.data
    for at in (0.01, 0.03):
        certified = [
            bj.certify(
                network.pure,
                data.images,
                at,
                labels=data.labels,
                clip=(0.0, 1.0),
                method=method,
                rounding="nearest",
            ).verified
            for method in ("interval", "crown-ibp")
        ]
        error = 1 - np.mean(np.any(certified, axis=0))
        # The bisection is exact to 0.04 / 2 ** 12.
        around = verified_error.error_at(radii, np.array([at - 2e-5, at + 2e-5]))
        assert around[0] <= error + 1e-9
        assert error <= around[1] + 1e-9


def test_widths_are_in_the_order_of_the_layers(network):
    lines = widths.widths_of(network.pure, network.data, network.threat)
    bounds = [
        bj.interval(network.pure.of_one_example(network.pure.variables), has_aux=True)(
            network.threat(image)
        )[1]
        for image in network.data.images
    ]
    assert list(lines.widths) == list(bounds[0])
    for label, width in lines.widths.items():
        expected = np.mean([np.mean(b[label].upper - b[label].lower) for b in bounds])
        assert width == pytest.approx(float(expected), rel=1e-5)


def test_runs_of_two_tests_have_no_trade_off(tmp_path):
    first = trade_off.Accuracies("IBP", 90.0, 80.0, 70.0, "digits, l-inf eps 0.1")
    with pytest.raises(ExperimentError, match=r"the runs must have one test, got digits, l-inf"):
        trade_off.plot_trade_off([first, first._replace(tested="digits, l-inf eps 0.2")], tmp_path)


def test_the_curves_of_a_run_with_a_tiny_radius(tmp_path):
    line = {"epoch": 1, "eps": 0.0, "kappa": 1.0, "beta": 1.0, "loss": 2.0, "standard_error": 0.5}
    path = tmp_path / "curves.png"
    curves.plot_curves([line, line | {"epoch": 2, "eps": 1e-3}], "title", path, "l-inf")
    assert path.stat().st_size > 3_000
