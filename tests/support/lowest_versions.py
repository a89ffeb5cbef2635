"""Prints constraints that pin every dependency to its lower bound in `setup.cfg`.

    python tests/support/lowest_versions.py > lowest.txt
    python -m pip install -e '.[dev]' -c lowest.txt

The tests of that environment prove the lower bounds.
"""

import configparser
import re
from pathlib import Path

SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"


def constraints() -> list[str]:
    """`name==version` for every requirement with a lower bound, in the order of the file."""
    setup = configparser.ConfigParser()
    setup.read(SETUP, encoding="utf-8")
    extras = setup["options.extras_require"].values()
    lines = "\n".join([setup["options"]["install_requires"], *extras]).splitlines()
    bounds = (re.match(r"([\w-]+)>=([\w.]+)", line.strip()) for line in lines)
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


if __name__ == "__main__":
    print("\n".join(constraints()))
