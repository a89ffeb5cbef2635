"""The options of `linear` for methods of the CROWN family, by name."""

from __future__ import annotations

from collections.abc import Mapping

import optax  # pyright: ignore[reportMissingTypeStubs]

from boundjax.slopes import optimized
from boundjax.transforms.linear import LinearOptions

LINEAR_OPTIONS: Mapping[str, LinearOptions] = {
    "crown-ibp": {},
    "crown": {"intermediate": "linear"},
    # Without intersection, as published, so that published errors are reproduced.
    "fast-lin": {"slopes": "parallel", "intermediate": "linear", "intersect": False},
    # The learning rate and its decay came closest to another library's stored bounds.
    "alpha-crown": {
        "slopes": optimized(
            steps=20,
            rule=optax.adam(optax.exponential_decay(0.5, transition_steps=1, decay_rate=0.9)),
            per_spec=True,
            optimize_intermediate=True,
        ),
        "intermediate": "linear",
    },
}
