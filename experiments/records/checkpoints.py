"""Checkpoints of a run: written in the background, complete or absent, tied to one config."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from experiments.records.same_config import check_same_config
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError


class _Manager(ocp.CheckpointManager):
    """Leaves preemption to `experiments.cluster.preemption`, which counts its own calls."""

    def reached_preemption(self, step: int) -> bool:
        """Returns False without asking JAX, which would count this as one of those calls."""
        return False


class Checkpoints:
    """The two latest checkpoints of one run folder.

    All processes must call every method in the same order. Restored arrays are laid out like the
    arguments, whatever the number of devices at the time of saving.

    Each checkpoint holds `state` (of the train step), `selected` (the parameters selected so far)
    and `metadata` (the configuration and the seconds spent so far).
    """

    def __init__(self, workdir: Path, config: Config):
        """Opens or creates `workdir/checkpoints`."""
        logging.getLogger("absl").setLevel(logging.WARNING)  # orbax reports every file it writes
        self._config = config
        self._folder = workdir / "checkpoints"
        self._manager = _Manager(
            self._folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=True, create=True
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "selected": ocp.StandardCheckpointHandler(),
                "metadata": ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def step(self) -> int:
        """The step of the latest checkpoint; 0 without one."""
        return self._manager.latest_step() or 0

    def restore(self, state: Any, selected: Any) -> tuple[Any, Any, float] | None:
        """Returns the latest (state, selected, seconds), laid out like the arguments, or None.

        Raises:
          ExperimentError: if the checkpoint is of another configuration, or cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        try:
            metadata = self._manager.restore(
                step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
            )["metadata"]
            check_same_config(metadata["config"], self._config, self._folder)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(_abstract(state)),
                    selected=ocp.args.StandardRestore(_abstract(selected)),
                ),
            )
            seconds = float(metadata["seconds"])
            if not 0 <= seconds < math.inf:
                raise ValueError(f"metadata: seconds must be a number >= 0, got {seconds}")
        except ExperimentError:
            raise
        except Exception as error:  # orbax raises errors of many types for damaged files
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise ExperimentError(
                f"{self._folder}/{step} cannot be restored "
                f"({type(error).__name__}: {reason[:120]}); "
                "delete that folder to resume from the checkpoint before it"
            ) from error
        return restored["state"], restored["selected"], seconds

    def save(self, step: int, state: Any, selected: Any, seconds: float) -> None:
        """Starts writing in the background."""
        if step == self._manager.latest_step():
            return
        # The loop donates the state to the next step. On CPU the writer may still read the same
        # buffers, so it gets copies.
        state, selected = jax.tree.map(jnp.copy, (state, selected))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                selected=ocp.args.StandardSave(selected),
                metadata=ocp.args.JsonSave({"config": self._config.to_dict(), "seconds": seconds}),
            ),
        )

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on disk, and ends saving."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
