"""Pure functions of certified training: schedules, losses, regularizers; no loops, no files."""

from boundjax.training.expressive import cc_ibp_margins as cc_ibp_margins
from boundjax.training.expressive import exp_ibp_loss as exp_ibp_loss
from boundjax.training.expressive import mtl_ibp_loss as mtl_ibp_loss
from boundjax.training.expressive import rectified_link as rectified_link
from boundjax.training.expressive import scaled_product as scaled_product
from boundjax.training.expressive import small_box as small_box
from boundjax.training.initializers import ibp_normal as ibp_normal
from boundjax.training.losses import cross_entropy as cross_entropy
from boundjax.training.losses import fused_robust_cross_entropy as fused_robust_cross_entropy
from boundjax.training.losses import margins_of as margins_of
from boundjax.training.losses import mixed_objective as mixed_objective
from boundjax.training.losses import robust_cross_entropy as robust_cross_entropy
from boundjax.training.regularizers import RELUStates as RELUStates
from boundjax.training.regularizers import gap_to_attained as gap_to_attained
from boundjax.training.regularizers import l1_norm as l1_norm
from boundjax.training.regularizers import relaxation_slack as relaxation_slack
from boundjax.training.regularizers import relu_balance_loss as relu_balance_loss
from boundjax.training.regularizers import relu_stability_loss as relu_stability_loss
from boundjax.training.regularizers import relu_states as relu_states
from boundjax.training.regularizers import tightness_loss as tightness_loss
from boundjax.training.schedules import eps_dependent as eps_dependent
from boundjax.training.schedules import linear_schedule as linear_schedule
from boundjax.training.schedules import smoothed_schedule as smoothed_schedule
from boundjax.training.schedules import stairs_schedule as stairs_schedule
