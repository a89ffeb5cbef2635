"""Prints or runs one training for every point of a sweep.

    python launch/sweep.py --config=experiments/configs/digits_crown.py
    python launch/sweep.py --config=experiments/configs/mnist_crown.py:cpu \
        --grid seed=0,1,2 --grid robust.eps_train=0.1,0.2 --run

The points are the dictionaries that the config file's `sweep()` yields, like
`{"robust.eps_train": 0.2}`, each combined with every combination of the `--grid` flags. Settings
for all points are given as for one run: `--config.train.epochs=5`. Without `--run` the commands are
only printed; with it they run one after the other, each in a folder that is named after its point,
so that the same command continues with unfinished points and repeats nothing. For job arrays,
`--count` prints the number of points and `--index I` takes one of them (from 0).

The exit status is 0 if all requested points are finished, 75 if a signal interrupted one, which has
saved its state, and otherwise that of the first point that failed.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib.util
import itertools
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.main import experiment_name
from experiments.settings.errors import ExperimentError
from launch.children import UNFINISHED, Children, exit_status, kill_group

_LONGEST_NAME = 120
# Statuses of a run that a signal stopped: after it saved, or before it had anything to save.
_STOPPED = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)


class Point(NamedTuple):
    """One training of a sweep.

    Attributes:
      name: name of the folder, made of the varied settings.
      folder: the run folder.
      arguments: the arguments of `experiments.main`.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether the training has finished."""
        return (self.folder / "summary.json").exists()

    def command(self, python: str = "python") -> list[str]:
        """Returns the command that starts or resumes the training."""
        return [python, "-m", "experiments.main", *self.arguments]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options, common = _parse(arguments)
    try:
        points = expand(options.config, options.grid, options.workdir, common)
        if options.index is not None and not 0 <= options.index < len(points):
            raise ExperimentError(
                f"--index={options.index}: this sweep has the points 0 to {len(points) - 1}"
            )
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.count:
        print(len(points))
        return 0
    selected = points if options.index is None else [points[options.index]]
    if options.run and not options.dry_run:
        return _run(selected)
    for point in selected:
        print(shlex.join(point.command()))
    return 0


def expand(
    config: str, grids: Sequence[str] = (), workdir: Path | None = None, common: Sequence[str] = ()
) -> list[Point]:
    """Returns all points of a sweep in a fixed order.

    Args:
      config: `FILE.py` or `FILE.py:VARIANT`.
      grids: texts like `seed=0,1,2`.
      workdir: folder of the sweep; by default `runs/sweep-NAME`.
      common: flags for all points.

    Raises:
      ExperimentError: for a bad file, key or grid, or if nothing is varied.
    """
    module, settings = _load(config)
    bases = list(module.sweep()) if hasattr(module, "sweep") else []
    parsed = [_parse_grid(text) for text in grids]
    if not bases and not parsed:
        raise ExperimentError(
            f"--config={config} has no sweep() and there is no --grid: nothing to vary; "
            "e.g. --grid seed=0,1,2"
        )
    workdir = workdir or Path("runs") / f"sweep-{experiment_name(config)}"
    points = []
    for base, *values in itertools.product(bases or [{}], *(values for _, values in parsed)):
        if not isinstance(base, Mapping):
            raise ExperimentError(
                f"sweep() of {config} must yield dictionaries of settings, got {base!r}"
            )
        pairs = list(base.items()) + [
            (key, value) for (key, _), value in zip(parsed, values, strict=True)
        ]
        _check_keys([key for key, _ in pairs], settings)
        texts = [f"{key}={_text(value)}" for key, value in pairs]
        name = _folder_name(texts)
        varied = (f"--config.{text}" for text in texts)
        folder = workdir / name
        points.append(
            Point(name, folder, (f"--config={config}", f"--workdir={folder}", *common, *varied))
        )
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise ExperimentError(f"the point {name} occurs twice: leave one out")
    return points


def _run(points: Sequence[Point]) -> int:
    status, children = 0, Children()
    with children.forwarding():
        for number, point in enumerate(points, start=1):
            title = f"point {number} of {len(points)}: {point.name}"
            if point.finished:
                print(f"{title}: finished already", flush=True)
                continue
            if children.signals:
                return status or UNFINISHED
            print(f"{title}\n{shlex.join(point.command())}", flush=True)
            process = children.start(point.command(sys.executable))
            point_status = exit_status(process.wait())
            kill_group(process)
            if not point.finished and point_status in _STOPPED:
                # The signal may have gone to the child alone.
                print(f"{title}: interrupted; the same command continues it", file=sys.stderr)
                return UNFINISHED
            if point_status:
                print(f"{title}: failed with status {point_status}", file=sys.stderr)
            status = status or point_status
    return status


def _load(config: str) -> tuple[Any, set[str]]:
    """Returns the module of a config file and the keys of its configuration."""
    text, _, variant = config.partition(".py:")
    path = Path(text if text.endswith(".py") else f"{text}.py")
    if not path.is_file():
        raise ExperimentError(f"--config={config}: no such file {path}")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None  # the file ends with .py
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    settings = module.get_config(variant) if variant else module.get_config()
    return module, set(_flat(settings.to_dict()))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _check_keys(keys: Sequence[str], settings: set[str]) -> None:
    for key in keys:
        if key not in settings:
            close = difflib.get_close_matches(str(key), settings, n=1)
            hint = f": did you mean {close[0]!r}?" if close else ""
            raise ExperimentError(f"unknown config key {key!r}{hint}")
        if keys.count(key) > 1:
            raise ExperimentError(f"{key!r} is varied twice: leave one out")


def _parse_grid(text: str) -> tuple[str, list[str]]:
    """Splits `"optim.milestones=(1,2),(3,)"` into its key and the values `["(1,2)", "(3,)"]`."""
    key, _, listed = text.partition("=")
    # Commas within brackets belong to a value.
    values = [value.strip() for value in re.split(r",(?![^()\[\]]*[)\]])", listed)]
    if not key or not all(values):
        raise ExperimentError(f"--grid {text}: expected KEY=VALUE,VALUE,... as in seed=0,1,2")
    return key, values


def _text(value: Any) -> str:
    return repr(value).replace(" ", "") if isinstance(value, tuple | list) else str(value)


def _folder_name(texts: Sequence[str]) -> str:
    """Makes a folder name from the varied settings that needs no quotes in a shell."""
    name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", ",".join(texts))
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(",".join(texts).encode()).hexdigest()[:12]
    return f"{name[: _LONGEST_NAME - 13]}-{digest}"


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        usage="python launch/sweep.py --config=FILE.py[:VARIANT] [flags]",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the experiment, as for experiments.main")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=V,V", help="vary a setting; repeatable"
    )
    parser.add_argument("--workdir", type=Path, help="folder of the sweep (runs/sweep-NAME)")
    parser.add_argument("--index", type=int, help="only this point, from 0")
    parser.add_argument("--count", action="store_true", help="only print the number of points")
    parser.add_argument("--run", action="store_true", help="run the commands, do not print them")
    parser.add_argument("--dry-run", action="store_true", help="print the commands despite --run")
    options, settings = parser.parse_known_args(arguments)
    for flag in settings:
        if not re.match(r"--config\.[\w.]+=", flag):
            parser.error(f"unknown flag {flag}; settings look like --config.key=value")
    return options, settings


if __name__ == "__main__":
    sys.exit(main())
