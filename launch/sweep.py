"""Prints or runs one training for every point of a sweep.

    python launch/sweep.py --config=experiments/configs/digits_crown.py
    python launch/sweep.py --config=experiments/configs/mnist_crown.py:cpu \
        --grid seed=0,1,2 --grid robust.eps_train=0.1,0.2 --run

The points are those that the config file's `sweep()` yields, dictionaries like
`{"robust.eps_train": 0.2}`, each with every combination of the `--grid` flags. Settings for all
points are given as for one run: `--config.train.epochs=5`. Without `--run` the commands are
printed; with it they run one after the other, each in a folder of its own that is named after the
point, so that the same command goes on with what is not finished and nothing is done twice.
`--count` prints how many points there are, `--index I` takes one of them (from 0), for job arrays.

The exit status is 0 when all points that were asked for are finished, 75 when a signal
interrupted one, which then has saved what it had, and otherwise the first failing one.
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
# Of a run that a signal stopped: it saved, or it had not come to that yet.
_STOPPED = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)


class Point(NamedTuple):
    """One training of a sweep.

    Attributes:
      name: of the folder, made of what is varied.
      folder: its run folder.
      arguments: of `experiments.main`.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.folder / "summary.json").exists()

    def command(self, python: str = "python") -> list[str]:
        """The command that trains it or goes on with it."""
        return [python, "-m", "experiments.main", *self.arguments]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
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
    chosen = points if options.index is None else [points[options.index]]
    if options.run and not options.dry_run:
        return _run(chosen)
    for point in chosen:
        print(shlex.join(point.command()))
    return 0


def expand(
    config: str, grids: Sequence[str] = (), workdir: Path | None = None, common: Sequence[str] = ()
) -> list[Point]:
    """All points of a sweep, in a fixed order.

    Args:
      config: `FILE.py` or `FILE.py:VARIANT`.
      grids: texts like `seed=0,1,2`.
      workdir: of the sweep; by default `runs/sweep-NAME`.
      common: flags for all points.

    Raises:
      ExperimentError: for a file, a key or a grid that is not one, or if nothing is varied.
    """
    module, settings = _load(config)
    own = list(module.sweep()) if hasattr(module, "sweep") else []
    parsed = [_parse_grid(text) for text in grids]
    if not own and not parsed:
        raise ExperimentError(
            f"--config={config} has no sweep() and there is no --grid: nothing to vary; "
            "e.g. --grid seed=0,1,2"
        )
    workdir = workdir or Path("runs") / f"sweep-{experiment_name(config)}"
    points = []
    for base, *values in itertools.product(own or [{}], *(values for _, values in parsed)):
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
            found = exit_status(process.wait())
            kill_group(process)
            if not point.finished and found in _STOPPED:
                # Also if it was not this process that the signal was sent to.
                print(f"{title}: interrupted; the same command goes on", file=sys.stderr)
                return UNFINISHED
            if found:
                print(f"{title}: failed with status {found}", file=sys.stderr)
            status = status or found
    return status


def _load(config: str) -> tuple[Any, set[str]]:
    """The module of a config file, and the keys that its configuration has."""
    text, _, variant = config.partition(".py:")
    path = Path(text if text.endswith(".py") else f"{text}.py")
    if not path.is_file():
        raise ExperimentError(f"--config={config}: no such file {path}")
    specification = importlib.util.spec_from_file_location(path.stem, path)
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
    """`("optim.milestones", ["(1,2)", "(3,)"])` for `"optim.milestones=(1,2),(3,)"`."""
    key, _, listed = text.partition("=")
    # Commas within brackets belong to a value.
    values = [value.strip() for value in re.split(r",(?![^()\[\]]*[)\]])", listed)]
    if not key or not all(values):
        raise ExperimentError(f"--grid {text}: expected KEY=VALUE,VALUE,... as in seed=0,1,2")
    return key, values


def _text(value: Any) -> str:
    return repr(value).replace(" ", "") if isinstance(value, tuple | list) else str(value)


def _folder_name(texts: Sequence[str]) -> str:
    """What is varied, as the name of a folder that no shell has to quote."""
    name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", ",".join(texts))
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(",".join(texts).encode()).hexdigest()[:12]
    return f"{name[: _LONGEST_NAME - 13]}-{digest}"


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    summary, _, rest = __doc__.partition("\n")
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
    parser.add_argument("--workdir", type=Path, help="of all points (default: runs/sweep-NAME)")
    parser.add_argument("--index", type=int, help="only this point, from 0")
    parser.add_argument("--count", action="store_true", help="only print how many points")
    parser.add_argument("--run", action="store_true", help="run instead of printing")
    parser.add_argument("--dry-run", action="store_true", help="print, even beside --run")
    options, rest_of_flags = parser.parse_known_args(arguments)
    for flag in rest_of_flags:
        if not re.match(r"--config\.[\w.]+=", flag):
            parser.error(f"unknown flag {flag}; settings look like --config.key=value")
    return options, rest_of_flags


if __name__ == "__main__":
    sys.exit(main())
