"""Decides properties of a JAX function: attack, bounds, splits of the input box and of units.

`programs` and `domains` hold the compiled functions, `search` decides, `tree` splits units.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
