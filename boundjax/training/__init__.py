"""Pure functions of certified training: schedules and losses. No loop, no files."""

from boundjax.training.initializers import ibp_normal as ibp_normal
from boundjax.training.losses import cross_entropy as cross_entropy
from boundjax.training.losses import fused_robust_cross_entropy as fused_robust_cross_entropy
from boundjax.training.losses import mixed_objective as mixed_objective
from boundjax.training.losses import robust_cross_entropy as robust_cross_entropy
from boundjax.training.schedules import eps_dependent as eps_dependent
from boundjax.training.schedules import linear_schedule as linear_schedule
from boundjax.training.schedules import smoothed_schedule as smoothed_schedule
