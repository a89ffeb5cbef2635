"""Runs: the training, evaluation and summary of one seed or several."""
