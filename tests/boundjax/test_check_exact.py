"""Certificates proved in rational numbers, beside the checker in float64."""

import math

import certificate_files as files
import numpy as np
import pytest

import boundjax as bj
from boundjax import check, check_exact


def run(capsys, *arguments):
    status = check_exact.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return status, printed.out.splitlines() + printed.err.splitlines()


def saved(folder, name, method, *, norm=math.inf, eps=0.1, count=1, **options):
    model, shape = files.model_of(name)
    x = files.inputs_of(shape, count)
    certificate = bj.certify(model, x, eps, norm=norm, clip=(0.0, 1.0), method=method, **options)
    bj.export_weights(model, x, folder / "weights.npz")
    certificate.save(folder / "certificate.npz", model, x)
    return certificate, x, (folder / "certificate.npz", "--weights", folder / "weights.npz")


@pytest.mark.parametrize(
    ("name", "method", "norm"),
    [
        ("mlp", "crown", math.inf),
        ("mlp", "crown-ibp", 2),
        ("mlp", "crown-ibp", 1),
        ("piecewise", "crown", math.inf),
        ("cnn", "interval", math.inf),
    ],
)
@pytest.mark.sampled(4)
def test_true_certificates_are_proved(name, method, norm, tmp_path, capsys):
    certificate, x, arguments = saved(
        tmp_path, name, method, norm=norm, eps=0.1 if norm == math.inf else 0.3
    )
    status, printed = run(capsys, *arguments)
    assert (status, printed) == (
        0,
        [
            "for real numbers; computed in rationals",
            f"1 of 1 examples checked (seed 0), {certificate.verified.sum()} claimed robust: "
            "0 margins not proved",
        ],
    )
    # The checker in float64 claims no more, and hardly less.
    nodes, _ = check.read_weights(tmp_path / "weights.npz")
    _, arrays = check.read_certificate(tmp_path / "certificate.npz")
    sets = check.sets_of(arrays, x)
    rows = np.eye(3)[0] - np.eye(3)
    word = files.contents(tmp_path / "certificate.npz")[1]["witness"][0]
    with np.errstate(all="ignore"):
        walk = check.Bounds(nodes, (*(a[:1] for a in sets), norm), word, 0.0, 0.0)
    options = check_exact.argparse.Namespace(onnx=None, weights=tmp_path / "weights.npz")
    of_fractions, _ = check_exact.network_of(options)
    with np.errstate(all="ignore"):
        exact_sets = check_exact.exact_sets(arrays, x, 0)
        exact_walk = check_exact.Bounds(of_fractions, exact_sets, norm, word)
    for flat in (True, False):
        with np.errstate(all="ignore"):
            within = walk.bound(len(nodes) - 1, rows, flat)[0]
        bounds = exact_walk.bound(len(nodes) - 1, check_exact.exact(rows), flat)
        for low, exact in zip(within, bounds, strict=True):
            assert low <= exact
            # It does not refine the intervals of units whose lines coincide.
            assert flat or float(exact) - low < 1e-8 * max(1.0, abs(low))


def test_what_is_not_true_is_not_proved(tmp_path, capsys):
    certificate, _, arguments = saved(tmp_path, "mlp", "crown-ibp", count=4)
    arrays, claims = files.contents(tmp_path / "certificate.npz")
    example = int(np.flatnonzero(certificate.verified)[0])
    rival = (int(certificate.labels[example]) + 1) % 3
    arrays["margins"][example, rival] += 1e-3
    files.rewritten(tmp_path / "certificate.npz", arrays, claims)
    status, printed = run(capsys, *arguments)
    assert status == 1
    assert printed[1].startswith(f"example {example}, class {rival}: verified, margin ")
    assert "1 margins not proved" in printed[2]
    # Another sample does not meet it.
    others = [
        seed for seed in range(50) if np.random.default_rng(seed).permutation(4)[0] != example
    ]
    assert run(capsys, *arguments, "--sample", 1, "--seed", others[0])[0] == 0


def test_other_weights_are_another_network(tmp_path, capsys):
    *_, arguments = saved(tmp_path, "mlp", "interval")
    other, shape = files.model_of("mlp", seed=1)
    bj.export_weights(other, files.inputs_of(shape), tmp_path / "weights.npz")
    status, printed = run(capsys, *arguments)
    assert (status, len(printed)) == (2, 1)
    assert printed[0].endswith("it is about another network")


def test_functions_without_rationals_are_named(tmp_path, capsys):
    *_, arguments = saved(tmp_path, "tanh", "interval")
    assert run(capsys, *arguments) == (
        2,
        [f"cannot check {arguments[0]}: rationals have no 'tanh'; use boundjax.check"],
    )


def test_programs_are_none_of_its_business(tmp_path, capsys):
    *_, arguments = saved(tmp_path, "mlp", "interval", rounding="float32")
    status, printed = run(capsys, *arguments)
    assert (status, len(printed)) == (2, 1)
    assert "rationals prove real numbers alone; use boundjax.check" in printed[0]


def test_networks_that_would_take_hours_are_refused(tmp_path, capsys, monkeypatch):
    *_, arguments = saved(tmp_path, "mlp", "crown")
    monkeypatch.setattr(check_exact, "MOST_PRODUCTS", 100)
    status, printed = run(capsys, *arguments)
    assert (status, len(printed)) == (2, 1)
    assert "products of fractions, expected at most 1e+02; use boundjax.check" in printed[0]
