"""The methods of the search by name, from the loosest to the tightest; `complete` splits."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["interval", "crown-ibp", "crown", "alpha-crown", "complete"]

METHODS: tuple[Method, ...] = get_args(Method)
LADDER = METHODS[:-1]
