"""Ties the folder and the checkpoints of a run to one configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.settings import method_names
from experiments.settings.config import Config
from experiments.settings.differences import differing_keys, with_defaults
from experiments.settings.errors import ExperimentError

# Moving the data to another folder does not change a run. The number of devices changes only the
# order of sums.
_FREE_KEYS = ("data.dir", "data.tfds_dir", "mesh.data", "mesh.fsdp", "mesh.spec")


def check_same_config(stored: dict[str, Any], config: Config, where: Path) -> None:
    """Rejects a stored configuration that differs from `config`, naming the keys.

    A key that is newer than the run counts as having its default. Old spellings of method names
    count as the current ones.

    Raises:
      ExperimentError: if the run in `where` was made with another configuration.
    """
    current = method_names.updated(with_defaults(stored))
    differing = differing_keys(current, config.to_dict())
    keys = [key for key in differing if key not in _FREE_KEYS]
    if keys:
        raise ExperimentError(
            f"{where} holds a run of another config, which differs in {', '.join(keys)}; "
            "choose another run folder, or repeat that run's settings"
        )
