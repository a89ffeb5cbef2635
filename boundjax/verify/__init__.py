"""Decides VNN-LIB properties: `verify` for a JAX function, `python -m boundjax.verify` for files.

`programs` holds the compiled functions and `search` decides. The command is two processes: one
keeps time and the results (`supervisor`, `benchmark`), a `worker` decides.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
