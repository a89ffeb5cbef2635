"""What all figures share: the canvas, colours, legends, and the command that writes them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.settings.errors import ExperimentError, fail

# (the parsed flags, the PNG file) -> None; writes the file.
Draw = Callable[[argparse.Namespace, Path], None]


def create(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Creates a figure that needs no display, and its axes `[rows, columns]`.

    Args:
      width, height: in inches of 90 pixels.
      rows, columns: the grid of axes.
      **options: of `Figure.subplots`, such as `sharex=True`.
    """
    figure = Figure(figsize=(width, height), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for each in axes.flat:
        each.grid(alpha=0.3)
    return figure, axes


def legend(figure: Figure, *axes: Any) -> None:
    """Puts one legend of everything that is labelled in `axes` outside, on the right."""
    handles: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(list(handles.values()), list(handles), fontsize=8, loc="outside right center")


def colours(names: Sequence[str]) -> dict[str, Any]:
    """Gives every name a colour of its own; a name that occurs again keeps its colour.

    Two figures of the same runs in the same order have the same colours.
    """
    return {name: f"C{index % 10}" for index, name in enumerate(dict.fromkeys(names))}


def command(
    name: str,
    documentation: str | None,
    arguments: Sequence[str] | None,
    draw: Draw,
    add_flags: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    of_runs: bool = True,
) -> None:
    """Runs `python -m experiments.plots.NAME RUN... --out FILE`.

    Args:
      name: the module's name, also of the default file in the first run folder.
      documentation: the module's docstring, whose first line is the description.
      arguments: the words of the command line, or None for those of the process.
      draw: writes the figure from the flags; `flags.runs` are the run folders.
      add_flags: adds the figure's own flags to the parser.
      of_runs: whether the command takes run folders.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.plots.{name}",
        description=(documentation or "").partition("\n")[0],
    )
    if of_runs:
        parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
        text = f"the PNG file (default: {name}.png in the first run folder)"
    else:
        text = f"the PNG file (default: {name}.png)"
    parser.add_argument("--out", type=Path, help=text)
    add_flags(parser)
    flags = parser.parse_args(arguments)
    folder = flags.runs[0] if of_runs else Path()
    out = flags.out or folder / f"{name}.png"
    try:
        if out.suffix != ".png" or not out.parent.is_dir():
            raise ExperimentError(f"--out={out}: must be a PNG file in an existing folder")
        draw(flags, out)
    except ExperimentError as error:
        fail(error)
    print(f"figure: {out}")


def add_count(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """Adds `--count`, the number of test images of each run."""
    parser.add_argument(
        "--count",
        type=positive("--count"),
        default=default,
        help=f"the first test images of each run (default: {default or 'all'})",
    )


def positive(flag: str) -> Callable[[str], int]:
    """Returns the reader of a flag whose value is an integer of at least 1."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = 0
        if value < 1:
            raise argparse.ArgumentTypeError(f"{flag} must be an integer >= 1, got {text}")
        return value

    return read
