"""Measures of bounds and of the training on them, as pure functions; nothing here is trained."""

from boundjax.diagnostics.connectivity import Barrier as Barrier
from boundjax.diagnostics.connectivity import barrier as barrier
from boundjax.diagnostics.connectivity import bezier as bezier
from boundjax.diagnostics.connectivity import spread_over_batches as spread_over_batches
from boundjax.diagnostics.landscape import MULTIPLES as MULTIPLES
from boundjax.diagnostics.landscape import Landscape as Landscape
from boundjax.diagnostics.landscape import Measure as Measure
from boundjax.diagnostics.landscape import landscape as landscape
from boundjax.diagnostics.layers import difference_gain as difference_gain
from boundjax.diagnostics.layers import log_norm_product as log_norm_product
from boundjax.diagnostics.layers import mean_widths as mean_widths
from boundjax.diagnostics.layers import width_gains as width_gains
from boundjax.diagnostics.relaxations import GradientChange as GradientChange
from boundjax.diagnostics.relaxations import SlopeShares as SlopeShares
from boundjax.diagnostics.relaxations import relaxed_gradient_change as relaxed_gradient_change
from boundjax.diagnostics.relaxations import slope_shares as slope_shares
from boundjax.diagnostics.relus import WarmupMeasures as WarmupMeasures
from boundjax.diagnostics.relus import relu_states_by_layer as relu_states_by_layer
from boundjax.diagnostics.relus import slope_histograms as slope_histograms
from boundjax.diagnostics.relus import warmup_measures as warmup_measures
from boundjax.diagnostics.tightness import mean_translation as mean_translation
