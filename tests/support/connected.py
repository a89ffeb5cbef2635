"""Tiny networks and runs that curves connect."""

import contextlib

import pytest

from experiments import models
from experiments.settings.checks import from_config_dict

NETWORKS = {
    "test_mlp": {"hidden": (8,)},
    "test_other": {"hidden": (9,)},
    "test_bn": {"hidden": (8,), "batch_norm": True},
}
EPS = 0.03


@contextlib.contextmanager
def tiny_networks():
    with pytest.MonkeyPatch.context() as patch:
        for name, fields in NETWORKS.items():
            patch.setitem(models.MODELS, name, fields)
        yield


def connected_config(network="test_mlp", **groups):
    settings = {
        "data": {"name": "digits"},
        "model": {"name": network},
        "train": {"epochs": 1, "batch_size": 128},
        "robust": {"method": "ibp", "eps_train": EPS, "eps_test": 0.02},
    }
    for group, values in groups.items():
        settings[group] = settings.get(group, {}) | values
    return from_config_dict(settings)
