"""The settings of a run: typed, checked and compared."""
