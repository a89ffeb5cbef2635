"""The commands keep their compiled programs; tests do not."""

import os
import sys

import pytest
from absl import flags

from boundjax import cache
from experiments import connect, evaluate, main, reproduce
from experiments.benchmarks import random_networks, rounding

pytestmark = pytest.mark.quick


class Enabled(Exception):
    """The command asked for the cache."""


def train(arguments):
    try:
        main.main(main.parse_flags(["main", *arguments])[:1])
    finally:
        flags.FLAGS.unparse_flags()


# Reading the config file, ml-collections calls what Python 3.12 has no more.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (train, ["--config={project}/experiments/configs/digits_crown.py", "--workdir={folder}"]),
        (evaluate.main, ["--workdir={folder}"]),
        (connect.main, ["{folder}/a", "{folder}/b", "--loss=interval"]),
        (reproduce.main, ["mnist-ibp-0.1", "--workdir={folder}"]),
        (random_networks.main, ["{folder}"]),
        (lambda arguments: rounding.main(), []),
    ],
    ids=["main", "evaluate", "connect", "reproduce", "random_networks", "rounding"],
)
def test_a_command_enables_the_cache_before_it_computes(
    command, arguments, tmp_path, project, monkeypatch
):
    def enable():
        raise Enabled

    monkeypatch.setattr(cache, "enable_if_possible", enable)
    filled = [text.format(folder=tmp_path, project=project) for text in arguments]
    monkeypatch.setattr(sys, "argv", ["command", *filled])
    with pytest.raises(Enabled):
        command(filled)
    assert not list(tmp_path.iterdir())


def test_tests_have_no_cache():
    assert os.environ[cache.VARIABLE] == "off"
