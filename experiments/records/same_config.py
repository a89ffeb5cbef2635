"""A run belongs to one configuration: its folder and its checkpoints refuse another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.settings import method_names
from experiments.settings.config import Config
from experiments.settings.differences import differing_keys, with_defaults
from experiments.settings.errors import ExperimentError

# A run stays the same when its data moves to another folder. The number of devices changes only the
# order of sums.
_FREE_KEYS = ("data.dir", "data.tfds_dir", "mesh.data", "mesh.fsdp", "mesh.spec")


def check_same_config(found: dict[str, Any], config: Config, where: Path) -> None:
    """Refuses a stored configuration that differs from this one, naming the keys.

    A run that is older than a key was made with its default. Old spellings of method names count as
    the current ones.

    Raises:
      ExperimentError: if the run in `where` was made with another configuration.
    """
    stored = method_names.updated(with_defaults(found))
    differing = differing_keys(stored, config.to_dict())
    keys = [key for key in differing if key not in _FREE_KEYS]
    if keys:
        raise ExperimentError(
            f"{where} holds a run of another config, which differs in {', '.join(keys)}; "
            "choose another --workdir, or repeat that run's settings"
        )
