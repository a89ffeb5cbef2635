"""Recognises functions that have no name in a jaxpr by their equations.

The builder compares every new node with these patterns. Where one matches, it traces another
function of earlier nodes instead, and drops the nodes that nothing needs any more. Every rewrite is
an identity of real numbers, whatever the values:

* softmax: `exp(a) / sum(exp(a)) = exp(log_softmax(a))`, invariant under adding to `a` anything
  that is constant along the axes, so that the subtracted maximum drops out, whatever it is;
* `log(sum(exp(a))) = logsumexp(a)`, `logsumexp(x - c) + c = logsumexp(x)`,
  `a - logsumexp(a) = log_softmax(a)`;
* `where(mask, exp(a), 0) = exp(where(mask, a, -inf))`, the terms of these sums under a mask;
* "fast variance": `mean(x^2) - mean(x)^2 = mean((x - mean(x))^2)`;
* layer, group, batch and RMS norm: `d * rsqrt(mean(d^2) + eps)` is one op, `normalize`;
* gelu and silu; `where(x > 0, a x, b x)`, a hinge;
* `(conv(x, K) + b) c = conv(x, K c) + b c`: batch normalisation.

A match whose op has no entry in the table is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from boundjax.ir.node import Node
from boundjax.tracing.matching import GraphView
from boundjax.tracing.patterns import activations, folding, normalization, softmax
from boundjax.tracing.patterns.rule import Rewrite

Pattern = Callable[[GraphView, Node], Rewrite | None]


def rewrite(view: GraphView, node: Node) -> Rewrite | None:
    """Returns what to trace in place of a node that is about to be appended; None for most.

    Args:
      view: the nodes before it.
      node: the new node.
    """
    for pattern in _PATTERNS.get(node.primitive, ()):
        replacement = pattern(view, node)
        if replacement is not None:
            return replacement
    return None


_PATTERNS: Mapping[str, tuple[Pattern, ...]] = {
    "add": (softmax.shifted_back,),
    "div": (softmax.softmax, normalization.normalized, folding.folded),
    "log": (softmax.logarithm,),
    "mul": (normalization.normalized, activations.univariate, folding.folded),
    "select_n": (activations.hinges, softmax.masked_terms),
    "sub": (normalization.variance, softmax.log_softmax),
}
