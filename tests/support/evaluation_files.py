"""Evaluation files for tests: a small one as the real `write` makes it, and changed ones."""

import json
import re

import numpy as np
import pytest

from experiments.evaluation import certificate_checks, certificates
from experiments.evaluation.certificates import Certificates
from experiments.settings.errors import ExperimentError

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1], np.int32)
LOSSES = ("cross_entropy", "margin")
VERSIONS = {"python": "3.12.3", "jax": "0.11.2", "boundjax": "not installed, run from a checkout"}
BOUNDED = {"arithmetic": "exact-real", "dtype": "float32"}


def settings() -> dict:
    """Settings as `experiments.evaluate` has written them since the first version."""
    return {
        "parameters_sha256": "0123456789abcdef" * 4,
        "images_sha256": "fedcba9876543210" * 4,
        "data": "UCI digits",
        "split": "test",
        "count": 8,
        "which": "last epoch (3)",
        "eps": 0.03,
        "norm": "inf",
        "clip": [0.0, 1.0],
        "attack": {
            "name": "PGD, best iterate, the first start at the image",
            "losses": list(LOSSES),
            "steps": 3,
            "step_size": "eps / 4",
            "restarts": 2,
            "batch_size": 50,
            "seed": 0,
        },
    }


def record(**bounded: str) -> dict:
    return {"versions": dict(VERSIONS), "device": "2 x cpu", "seconds": 1.5, **bounded}


def evaluation() -> Certificates:
    """A finished cascade: example 7 is misclassified, PGD breaks 5 and 6, 0 to 2 are verified."""
    result = certificates.empty(LABELS, LOSSES, settings())
    result.record_clean_pass(np.arange(8) < 7)
    result.resisted_by["cross_entropy"][:6] = True
    result.resisted_by["margin"][:5] = True
    result.attacked[:] = True
    run = {"interval": np.arange(8), "crown-ibp": np.array([2, 3, 4])}
    margins = np.full((8, 3), -0.5, np.float32)
    for method, rows in run.items():
        result.add_method(method, classes=3)
        result.run_by[method][rows] = True
        margins[2 if method == "crown-ibp" else slice(2)] = 0.25
        margins[np.arange(8), LABELS] = 0.0
        result.margins_by[method][rows] = margins[rows]
        result.verified_by[method][:] = certificate_checks.proven(result.margins_by[method], LABELS)
        result.parts[method] = record(**BOUNDED)
    # Bounds that overflowed prove nothing, which is no mistake of the file.
    result.margins_by["crown-ibp"][4, 0] = np.nan
    result.margins_by["interval"][4, 0] = -np.inf
    result.parts["attack"] = record()
    return result


def whole_file(folder):
    """The file of `evaluation` in a folder, as the real `write` makes it."""
    path = folder / "whole.npz"
    certificates.write(path, evaluation())
    return path


def stored(path):
    """The arrays of a file, and its metadata apart."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    return arrays, json.loads(str(arrays.pop("metadata")))


def store(path, arrays, metadata):
    """Writes any arrays; metadata that are not an array yet are written as JSON."""
    if not isinstance(metadata, np.ndarray):
        metadata = np.array(json.dumps(metadata))
    np.savez(path, metadata=metadata, **arrays)


def refusal(path, match, error=ExperimentError, **options):
    """The message with which a file is refused, which is one line and names the file."""
    with pytest.raises(error) as caught:
        certificates.read(path, **options)
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message
    assert len(message) < 600
    # The path is the name of the test: what is looked for would be in it.
    assert message.startswith(f"{path}")
    assert re.search(match, message.removeprefix(f"{path}")), message
    return message
