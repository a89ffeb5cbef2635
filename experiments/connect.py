"""Connects two trained networks by a curve, and says whether a certified loss has a barrier on it.

    python -m experiments.connect runs/crown runs/ibp --loss=interval
    python -m experiments.connect runs/crown runs/ibp --loss=crown-ibp --epochs=2 \
        --train-count=10000 --points=21 --count=2000 --out=runs/crown-to-ibp

The curve is `(1 - t)^2 A + 2 t (1 - t) C + t^2 B`. Its control point C is trained on the certified
loss `--loss` at the radius that the runs were trained at (`--eps`), without the natural loss. Then
three certified losses, standard and verified error are measured at `--points` positions `t` along
the curve, and along the straight segment from A to B. A loss has a barrier if it rises above both
ends by more than twice its spread over batches of test images.

The folder `--out` gets `connectivity.json`, `connectivity.jsonl` (a line per position) and
`connectivity.png`. The same command resumes after a kill. One process computes, on all of its
devices.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from boundjax import cache
from experiments.cluster import distributed, process_group
from experiments.connectivity.connect import Options, connect
from experiments.settings import radius
from experiments.settings.errors import ExperimentError, fail


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags, connects, prints the verdict; exits with status 2 after a mistake."""
    default = Options._field_defaults
    parser = argparse.ArgumentParser(
        prog="python -m experiments.connect", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("run_a", metavar="RUN_A", type=Path, help="the run folder at t = 0")
    parser.add_argument("run_b", metavar="RUN_B", type=Path, help="the run folder at t = 1")
    parser.add_argument("--loss", required=True, help="interval, crown-ibp or one-step")
    parser.add_argument("--out", type=Path, help="the folder (default: runs/A-B-LOSS)")
    parser.add_argument("--eps", help="0.1 or 8/255 (default: the radius of the training)")
    parser.add_argument("--epochs", type=int, default=default["epochs"])
    parser.add_argument("--lr", type=float, default=default["lr"], help="of Adam")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seed", type=int, default=default["seed"])
    parser.add_argument("--points", type=int, default=default["points"], help="positions t")
    parser.add_argument("--train-count", type=int, help="the first training images only")
    parser.add_argument("--count", type=int, help="the first test images only")
    every = default["checkpoint_every"]
    parser.add_argument("--checkpoint-every", type=int, default=every, help="steps")
    parser.add_argument("--data-dir", help="where the data set lies now")
    flags = vars(parser.parse_args(arguments))
    run_a, run_b = flags.pop("run_a"), flags.pop("run_b")
    try:
        if flags["eps"] is not None:
            flags["eps"] = radius.parse(flags["eps"])
        # One process, which SIGTERM ends with a checkpoint.
        with distributed.joined(process_group.from_flags(distributed="off")):
            cache.enable_if_possible()
            connect(run_a, run_b, Options(**flags))
    except ExperimentError as error:
        fail(error)


if __name__ == "__main__":
    main()
