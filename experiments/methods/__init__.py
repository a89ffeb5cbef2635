"""Training methods by name."""

from __future__ import annotations

from experiments.errors import ExperimentError
from experiments.methods.crown_ibp import CROWN_IBP
from experiments.methods.ibp import IBP
from experiments.methods.lipschitz import BCP, LMT
from experiments.methods.method import Batch as Batch
from experiments.methods.method import Method as Method
from experiments.methods.method import Objective as Objective
from experiments.methods.method import Threat as Threat
from experiments.methods.method import Weights as Weights
from experiments.methods.natural import NATURAL

METHODS: dict[str, Method] = {
    "natural": NATURAL,
    "ibp": IBP,
    "crown_ibp": CROWN_IBP,
    "bcp": BCP,
    "lmt": LMT,
}


def get(name: str) -> Method:
    """The method called `name`.

    Raises:
      ExperimentError: for an unknown name.
    """
    if name not in METHODS:
        raise ExperimentError(
            f"unknown robust.method {name!r}: use one of {', '.join(sorted(METHODS))}"
        )
    return METHODS[name]
