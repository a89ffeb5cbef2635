"""Transforms from a function to its bounds, one file per walk over the graph."""
