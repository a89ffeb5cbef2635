"""Trains and evaluates one experiment.

    python -m experiments.main --config=experiments/configs/digits_crown.py [--workdir=runs/digits]

`--config=FILE.py:VARIANT` chooses a variant, `--config.optim.lr=3e-4` changes a setting. The same
command resumes an interrupted run.

On several machines, run the same command on each if JAX knows the cluster (TPU pods, SLURM, Open
MPI, Kubernetes); otherwise add `--coordinator=HOST:PORT --processes=N --process=I`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_dict, config_flags

from boundjax import cache
from experiments.cluster import process_group
from experiments.records.versions import versions
from experiments.settings import method_names, radius
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError, fail

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: FILE.py or FILE.py:VARIANT.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run folder; by default runs/<name of the config>."
)
_PROCESS_GROUP = process_group.define_flags()


def default_workdir(config_file: str) -> Path:
    """Returns `runs/mnist_crown-cpu` for `experiments/configs/mnist_crown.py:cpu`."""
    return Path("runs") / experiment_name(config_file)


def experiment_name(config_file: str) -> str:
    """Returns `mnist_crown-cpu` for `experiments/configs/mnist_crown.py:cpu`."""
    path, _, variant = config_file.partition(".py:")
    stem = Path(path).stem
    return f"{stem}-{variant}" if variant else stem


def _method_names(config_file: str) -> list[str]:
    """Returns every text in which the command or its config file may name a method."""
    variant = config_file.partition(".py:")[2]
    return [*re.split("[,=]", variant), _CONFIG.value.get("robust", {}).get("method", "")]


def main(arguments: list[str]) -> None:
    """Runs the experiment of the flags; a mistake ends it with one line and exit status 2."""
    if not flags.FLAGS["verbosity"].present:
        # JAX and orbax log every backend that they look for and every file that they write.
        absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        if len(arguments) > 1:
            raise ExperimentError(
                f"unexpected argument {arguments[1]!r}; settings look like --config.key=value"
            )
        if _CONFIG.value is None:
            raise ExperimentError(
                "--config is missing: e.g. --config=experiments/configs/digits_crown.py"
            )
        config_file = config_flags.get_config_filename(flags.FLAGS["config"])
        # After a failure, ml-collections gives a stand-in.
        if not isinstance(_CONFIG.value, config_dict.ConfigDict):
            raise ExperimentError(
                f"--config={config_file}: no such file, or get_config returns no ConfigDict"
            )
        name = experiment_name(config_file)
        workdir = (
            Path(_WORKDIR.value).expanduser() if _WORKDIR.value else default_workdir(config_file)
        )
        config = from_config_dict(_CONFIG.value)
        command = {"config": config.to_dict(), "versions": versions(), "workdir": str(workdir)}
        group = process_group.from_flags(
            **{key: flag.value for key, flag in _PROCESS_GROUP.items()}
        )

        # Import JAX only now, so that mistakes above are reported without waiting for it.
        from experiments.cluster import distributed

        with distributed.joined(group):
            from experiments.run.run import run

            cache.enable_if_possible()
            distributed.agree(command)
            if notice := method_names.notice(_method_names(config_file)):
                print(notice, flush=True)
            run(config, workdir, name)
    except ExperimentError as error:
        fail(error)


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses flags with absl, and reports in one line what ml-collections would as a traceback."""
    # ml-collections wants the config file before its settings, also where it looks for their names.
    sys.argv[1:] = sorted(sys.argv[1:], key=_is_setting)
    program, *rest = (_as_number(argument) for argument in arguments)
    try:
        return flags.FLAGS([program, *sorted(rest, key=_is_setting)])
    except flags.Error as error:
        # An exception in a config file comes as a whole traceback, whose last line names it.
        last = str(error).strip().splitlines()[-1]
        return fail(last.removeprefix(f"{ExperimentError.__module__}.{ExperimentError.__name__}: "))
    except (AttributeError, KeyError) as error:  # a key, or a group of keys, that does not exist
        suggestion = re.search(r"Did you mean \W*(\w+)\W* instead of \W*(\w+)", str(error))
        if suggestion:
            return fail(f"unknown config key {suggestion[2]!r}: did you mean {suggestion[1]!r}?")
        return fail(f"unknown config key: {error}")
    except (OSError, TypeError, ValueError) as error:
        return fail(error)


def _is_setting(argument: str) -> bool:
    return not re.match("-{1,2}config=", argument)


def _as_number(argument: str) -> str:
    """Replaces the fraction in `--config.robust.eps_train=8/255`, which ml-collections rejects."""
    match = re.fullmatch(r"(-{1,2}config\.robust\.eps_\w+)=(.*/.*)", argument)
    return f"{match[1]}={radius.parse(match[2], match[1])}" if match else argument


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
