"""Parts that all experiments are composed of: defaults, arguments, milestones."""

from __future__ import annotations

import types

from ml_collections import config_dict

from experiments.settings import method_names
from experiments.settings.config import Config, to_config_dict
from experiments.settings.errors import ExperimentError

# What an argument may be: False of a flag, else its values, the default first.
Known = bool | tuple[str, ...]


def base() -> config_dict.ConfigDict:
    """Every key with its default (`experiments/settings/config.py` documents them)."""
    return to_config_dict(Config())


def arguments(variant: str, **known: Known) -> types.SimpleNamespace:
    """What `variant`, the text after `.py:`, asks for: `"cpu,eps=0.2"`.

    Args:
      variant: names of flags, and `name=value`, with commas between them.
      **known: False for a flag, or the values an argument can have, the default first.

    Returns:
      A bool for every flag and a str for every other argument; as `given`, the texts that
      `variant` consists of. Method names are as they are spelled now.

    Raises:
      ExperimentError: for what is not known, and for an argument given twice.
    """
    texts = {
        name: [name] if values is False else [f"{name}={value}" for value in values]
        for name, values in known.items()
    }
    found = {name: values if values is False else values[0] for name, values in known.items()}
    given = tuple(variant.split(",")) if variant else ()
    given = tuple("=".join(map(method_names.current, text.split("="))) for text in given)
    names = [text.partition("=")[0] for text in given]
    for text, name in zip(given, names, strict=True):
        if text not in texts.get(name, ()):
            raise ExperimentError(f"unknown argument {text!r}: this config has {_listed(known)}")
        if names.count(name) > 1:
            raise ExperimentError(f"{name!r} is given twice: this config has {_listed(known)}")
        found[name] = known[name] is False or text.partition("=")[2]
    return types.SimpleNamespace(**found, given=given)


def _listed(known: dict[str, Known]) -> str:
    described = (
        name if values is False else f"{name}={'|'.join(values)}" for name, values in known.items()
    )
    return ", ".join(described) or "no arguments"


def exclude(given: types.SimpleNamespace, argument: str, *others: str) -> None:
    """Raises a one-line error where `argument` is given beside one of `others`.

    Each is a whole argument like `"net=xlarge"` or, for any value of it, its name.
    """

    def among(wanted: str) -> list[str]:
        return [text for text in given.given if wanted in (text, text.partition("=")[0])]

    for other in others:
        for found in among(other):
            if among(argument):
                raise ExperimentError(f"{argument!r} does not go with {found!r}: leave one out")


def published_size(config: config_dict.ConfigDict) -> None:
    """How runs of a paper's size are computed and evaluated, by PGD-100 among others.

    On a GPU the products of a train step are in TF32, PyTorch's own default for convolutions.
    """
    config.train.precision = "high"
    config.evaluation.pgd_steps = 100
    config.evaluation.batch_size = 500
    config.evaluation.every = 5
    config.checkpoint.every = 1000


def two_cores(config: config_dict.ConfigDict) -> None:
    """Runs for 2 CPU cores: all images are trained on, so there is nothing to select on."""
    config.data.validation = 0
    config.evaluation.every = 5
    config.checkpoint.every = 200


def every(epochs: float, first: float, end: float) -> tuple[float, ...]:
    """The milestones `first`, `first + epochs`, ... before `end`."""
    count = max(0, -int(-(end - first) // epochs))
    return tuple(float(first + index * epochs) for index in range(count))
