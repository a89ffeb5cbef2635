"""A published row that can be reproduced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from experiments.published.tables import Numbers

DEFAULT = ("interval", "crown-ibp")
Budget = Literal["cpu", "gpu"]


class Row(NamedTuple):
    """One row of results.

    Attributes:
      name: its name on the command line.
      config: a configuration of `experiments.main`, `experiments/configs/FILE.py[:ARGUMENTS]`.
      published: the numbers of the paper.
      source: paper, table and row of these numbers.
      tolerance: percentage points by which the mean over the seeds may exceed the anchor, in
        verified and in standard error. It is one-sided: a better result is within.
      note: the reason for the tolerance, and what differs from the published row.
      methods: bounds whose union gives the verified error.
      budget: `"cpu"` for minutes to some hours per seed on 2 cores, `"gpu"` for an accelerator.
      seeds: the number of runs, with seeds 0, 1, ...
      prototype: numbers that such a network reached with such bounds; if there are any, they are
        the anchor.
      overrides: settings by dotted key, applied to the configuration.
      attacks: of a random network, the paper's errors in percent by attack and radius. Such a row
        has no bounds in `methods`, and the PGD error takes the verified error's place.
    """

    name: str
    config: str
    published: Numbers
    source: str
    tolerance: float
    note: str
    methods: tuple[str, ...] = DEFAULT
    budget: Budget = "cpu"
    seeds: int = 3
    prototype: Numbers | None = None
    overrides: Mapping[str, Any] = {}
    attacks: Mapping[str, float] = {}

    @property
    def anchor(self) -> Numbers:
        """The numbers to compare with."""
        return self.published if self.prototype is None else self.prototype
