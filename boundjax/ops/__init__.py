"""All that is known of every op, in one table; importing this package fills it."""

from boundjax.ops import activations as _activations
from boundjax.ops import affine as _affine
from boundjax.ops import control as _control
from boundjax.ops import extremum as _extremum
from boundjax.ops import hinge as _hinge
from boundjax.ops import integers as _integers
from boundjax.ops import normalization as _normalization
from boundjax.ops import product as _product
from boundjax.ops import selection as _selection
from boundjax.ops.registry import Expansion as Expansion
from boundjax.ops.registry import Extremum as Extremum
from boundjax.ops.registry import Joint as Joint
from boundjax.ops.registry import Lines as Lines
from boundjax.ops.registry import Op as Op
from boundjax.ops.registry import Planes as Planes
from boundjax.ops.registry import Scalar as Scalar
from boundjax.ops.registry import Structural as Structural
from boundjax.ops.registry import UnsupportedOpError as UnsupportedOpError
from boundjax.ops.registry import Weighted as Weighted
from boundjax.ops.registry import all_ops as all_ops
from boundjax.ops.registry import register as register
from boundjax.ops.registry import supported_ops as supported_ops

del _activations, _affine, _control, _extremum, _hinge, _integers, _normalization, _product
del _selection
