"""Decides VNN-LIB properties: `verify` for a JAX function, `python -m boundjax.verify` for files.

`programs` holds the compiled functions and `search` decides; `network` and `benchmark` serve the
command line.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
