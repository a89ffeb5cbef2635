"""Traces a JAX function to a graph: reads jaxprs, resolves control flow, recognises patterns."""
