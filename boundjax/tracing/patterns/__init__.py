"""Functions that have no name of their own in a jaxpr, recognised by their equations.

While a graph is built, every new node is compared with these patterns; where one fits, another
function of nodes that are there already is traced instead, and the nodes that nobody needs any more
are dropped. Every rewrite is an identity of real numbers, whatever the values are:

* softmax: ``exp(a) / sum(exp(a)) = exp(log_softmax(a))``, which does not change when anything that
  is constant along the axes is added to ``a``: the subtracted maximum goes, whatever it is;
* ``log(sum(exp(a))) = logsumexp(a)``, ``logsumexp(x - c) + c = logsumexp(x)``,
  ``a - logsumexp(a) = log_softmax(a)``;
* ``where(mask, exp(a), 0) = exp(where(mask, a, -inf))``, which they are with a mask;
* "fast variance": ``mean(x^2) - mean(x)^2 = mean((x - mean(x))^2)``;
* layer, group, batch and RMS norm: ``d * rsqrt(mean(d^2) + eps)`` is one op, ``normalize``;
* gelu and silu; ``where(x > 0, a x, b x)``, a hinge;
* ``(conv(x, K) + b) c = conv(x, K c) + b c``: batch normalisation.

A pattern whose op has no entry in the table is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from boundjax.ir.node import Node
from boundjax.tracing.matching import View
from boundjax.tracing.patterns import activations, folding, normalization, softmax
from boundjax.tracing.patterns.rule import Rewrite

Rule = Callable[[View, "Node"], Rewrite | None]


def rewrite(view: View, node: Node) -> Rewrite | None:
    """What to trace instead of a node that is about to be appended, None for most.

    Args:
      view: the nodes before it.
      node: the new one.
    """
    for rule in _RULES.get(node.primitive, ()):
        found = rule(view, node)
        if found is not None:
            return found
    return None


_RULES: Mapping[str, tuple[Rule, ...]] = {
    "add": (softmax.shifted_back,),
    "div": (softmax.softmax, normalization.normalized, folding.folded),
    "log": (softmax.logarithm,),
    "mul": (normalization.normalized, activations.univariate, folding.folded),
    "select_n": (activations.hinges, softmax.masked_terms),
    "sub": (normalization.variance, softmax.log_softmax),
}
