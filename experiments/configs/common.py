"""The parts that all experiments share: defaults, arguments, milestones."""

from __future__ import annotations

import types
from typing import Any, Literal, TypeAlias

from experiments.settings import method_names
from experiments.settings.config import Config, to_config_dict
from experiments.settings.errors import ExperimentError

# An editable `ml_collections.ConfigDict`. That class annotates every attribute with the union of
# all types of values, so even `config.train.epochs = 100` would be a type error. `from_config_dict`
# checks the values instead.
ConfigDict: TypeAlias = Any

# The choices of an argument: False for a flag, otherwise its values, the default first.
Choices = Literal[False] | tuple[str, ...]


def base() -> ConfigDict:
    """Returns every key with its default (`experiments/settings/config.py` documents them)."""
    return to_config_dict(Config())


def arguments(variant: str, **choices: Choices) -> types.SimpleNamespace:
    """Parses `variant`, the text after `.py:`, such as `"cpu,eps=0.2"`.

    Args:
      variant: names of flags, and `name=value`, separated by commas.
      **choices: False for a flag, or the values that an argument can have, the default first.

    Returns:
      A bool for every flag, a str for every other argument, and as `texts` the parts of `variant`.
      Old spellings of method names become current ones.

    Raises:
      ExperimentError: for an unknown argument, and for one that occurs twice.
    """
    allowed = {
        name: [name] if values is False else [f"{name}={value}" for value in values]
        for name, values in choices.items()
    }
    options: dict[str, Any] = {
        name: values if values is False else values[0] for name, values in choices.items()
    }
    parts = variant.split(",") if variant else []
    texts = tuple("=".join(map(method_names.current, part.split("="))) for part in parts)
    names = [text.partition("=")[0] for text in texts]
    for text, name in zip(texts, names, strict=True):
        if text not in allowed.get(name, ()):
            raise ExperimentError(f"unknown argument {text!r}: this config has {_listed(choices)}")
        if names.count(name) > 1:
            raise ExperimentError(f"{name!r} is given twice: this config has {_listed(choices)}")
        options[name] = choices[name] is False or text.partition("=")[2]
    return types.SimpleNamespace(**options, texts=texts)


def _listed(choices: dict[str, Choices]) -> str:
    described = (
        name if values is False else f"{name}={'|'.join(values)}"
        for name, values in choices.items()
    )
    return ", ".join(described) or "no arguments"


def exclude(options: types.SimpleNamespace, argument: str, *conflicts: str) -> None:
    """Raises a one-line error if `argument` occurs together with one of `conflicts`.

    Each is a whole argument like `"net=xlarge"`, or a name, which stands for any of its values.
    """

    def matches(argument: str) -> list[str]:
        return [text for text in options.texts if argument in (text, text.partition("=")[0])]

    for conflict in conflicts:
        for text in matches(conflict):
            if matches(argument):
                raise ExperimentError(f"{argument!r} excludes {text!r}: leave one out")


def published_size(config: ConfigDict) -> None:
    """Sets how runs of a paper's size are computed and evaluated: PGD-100 among other things.

    On a GPU the products of a train step use TF32, PyTorch's default for convolutions.
    """
    config.train.precision = "high"
    config.evaluation.pgd_steps = 100
    config.evaluation.batch_size = 500
    config.evaluation.every = 5
    config.checkpoint.every = 1000


def two_cores(config: ConfigDict) -> None:
    """Configures a run for 2 CPU cores: it trains on all images and selects no epoch."""
    config.data.validation = 0
    config.evaluation.every = 5
    config.checkpoint.every = 200


def every(epochs: float, first: float, end: float) -> tuple[float, ...]:
    """Returns the milestones `first`, `first + epochs`, ... before `end`."""
    count = max(0, -int(-(end - first) // epochs))
    return tuple(float(first + index * epochs) for index in range(count))
