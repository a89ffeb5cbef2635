"""Recognises functions that have no name in a jaxpr by their equations.

The builder compares every new node with these patterns. Where one matches, it traces another
function of earlier nodes instead, and drops the nodes that nothing needs any more. Every rewrite is
an identity of real numbers, whatever the values:

* softmax: `exp(a) / sum(exp(a)) = exp(log_softmax(a))`, invariant under adding to `a` anything
  that is constant along the axes, so that the subtracted maximum drops out, whatever it is;
* `log(sum(exp(a))) = logsumexp(a)`, `logsumexp(x - c) + c = logsumexp(x)`,
  `a - logsumexp(a) = log_softmax(a)`;
* `where(mask, exp(a), 0) = exp(where(mask, a, -inf))`, the terms of these sums under a mask;
* the softmax of `where(mask, a, -1e9)` is that of `where(mask, a, -inf)`, up to less than any
  number of the dtype; next to a -1e9 no digit of a bound would be right. The op has no bounds where
  `a` itself may be near such a number;
* `softmax(x)_i > softmax(x)_j` where `x_i > x_j` and all logits are numbers;
* "fast variance": `mean(x^2) - mean(x)^2 = mean((x - mean(x))^2)`;
* layer, group, batch and RMS norm: `d * rsqrt(mean(d^2) + eps)` is one op, `normalize`;
* `sqrt(sum(x^2) + eps)` is one op, `length`, and `x` over its length is `normalize` as well;
* gelu and silu; `where(x > 0, a x, b x)`, a hinge; `xlogy(x, x)`;
* `where(x > t, f(x), g(x)) = where(x > t, f(max(x, t)), g(min(x, t)))`, also for several
  comparisons of one value; with linear branches it is one op, `pieces`;
* `(conv(x, K) + b) c = conv(x, K c) + b c`: batch normalisation.

A match whose op has no entry in the table is left as it is.

Identities of real numbers are none of rounded ones. Bounds on what a program computes
(`"float32"`) use those rewrites alone whose ops are charged for at least what the original form
rounds: not for one that hides large terms that cancel (fast variance, batch normalisation behind a
large bias), nor for a shift of a softmax by anything but its maximum, nor for the order of its
entries, which may be another one once they are rounded. Under `"real"` a factor that
is itself computed stays outside of a kernel, where its error is charged per channel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from boundjax.ir.node import Node
from boundjax.sets.rounding import Rounding
from boundjax.tracing.matching import GraphView
from boundjax.tracing.patterns import (
    activations,
    branches,
    folding,
    lengths,
    normalization,
    softmax,
)
from boundjax.tracing.patterns.rule import Rewrite

Pattern = Callable[[GraphView, Node], Rewrite | None]
Patterns = Mapping[str, tuple[Pattern, ...]]


def rewriter(rounding: Rounding) -> Callable[[GraphView, Node], Rewrite | None]:
    """The rewrites of graphs whose bounds hold for this arithmetic.

    Returns:
      `rewrite(view, node)`: what to trace in place of a node that is about to be appended to the
      nodes of the view; None for most.
    """
    return functools.partial(_rewrite, _PATTERNS[rounding])


def _rewrite(patterns: Patterns, view: GraphView, node: Node) -> Rewrite | None:
    for pattern in patterns.get(node.primitive, ()):
        replacement = pattern(view, node)
        if replacement is not None:
            return replacement
    return None


def _patterns(rounding: Rounding) -> Patterns:
    only_maximum = rounding == "float32"
    fold = (folding.folded,) if rounding == "nearest" else ()
    variance = () if rounding == "float32" else (normalization.variance,)
    # An infinite value times 0 is NaN for a program, and 0 for a selection.
    masked = () if rounding == "float32" else (branches.masked,)
    of_softmax = functools.partial(softmax.softmax, only_maximum=only_maximum)
    of_logarithm = functools.partial(softmax.log_softmax, only_maximum=only_maximum)
    shifted_back = functools.partial(softmax.shifted_back, only_maximum=only_maximum)
    # Rounding may reverse the order of exponentials whose logits are nearly equal.
    of_logits = () if rounding == "float32" else (softmax.compared,)
    return {
        **dict.fromkeys(("ge", "gt", "le", "lt"), of_logits),
        "add": (shifted_back,),
        "argmax": () if rounding == "float32" else (softmax.largest,),
        "div": (of_softmax, normalization.normalized, lengths.divided, *fold),
        "log": (softmax.logarithm,),
        "mul": (
            normalization.normalized,
            lengths.divided,
            activations.univariate,
            branches.shrunk,
            *masked,
            *fold,
        ),
        "select_n": (
            activations.hinges,
            activations.entropy,
            softmax.masked_terms,
            branches.branches,
        ),
        "pow": (lengths.lengths,),
        "sqrt": (lengths.lengths,),
        "sub": (*variance, of_logarithm, branches.excess),
    }


_PATTERNS: Mapping[Rounding, Patterns] = {
    "nearest": _patterns("nearest"),
    "real": _patterns("real"),
    "float32": _patterns("float32"),
}
