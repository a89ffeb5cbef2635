"""The settings of a run: their types, their checks and their comparison."""
