"""Input sets: which inputs are possible, and the maximum of a linear function over them.

A set knows nothing about networks. It answers two questions:

* `interval()`: the smallest box around the set, from which interval bounds start;
* `support(c)`: `max <c, x>` over the set, with which linear bounds end ("concretize"); or
  `spread(c)`, the same measured from the middle of `interval()`, which the walks use because
  nothing cancels in it.

Sets are pytrees: build them inside `jax.vmap` / `jax.jit`, differentiate with respect to them.
"""

from boundjax.sets.ball import LpBall as LpBall
from boundjax.sets.ball_box import BallBox as BallBox
from boundjax.sets.box import Box as Box
from boundjax.sets.constrained import Constrained as Constrained
from boundjax.sets.input_set import InputSet as InputSet
from boundjax.sets.interval import Interval as Interval
from boundjax.sets.threat import Threat as Threat
