"""boundjax: guaranteed bounds on JAX functions, and certified training of Flax models.

Every public name is here. `interval` and `linear` turn a function of one example into a function
from an input set to bounds; `certify` and `certified_radius` answer for a model and a batch.
"""

import lazy_loader

# The names, with the modules that define them, are listed in `__init__.pyi`. Each is imported on
# first use: reading a property file or printing `--help` does not need JAX.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
