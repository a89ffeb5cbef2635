"""Decides properties of a JAX function: attack, bounds, splits of the input box and of units.

`prove` states a property of a function on an input set, `search` decides, `tree` splits units;
`programs` and `domains` hold the compiled functions of a `network`. `milp` computes exact optima.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
