"""Experiments on boundjax: run from a checkout, never packaged."""
