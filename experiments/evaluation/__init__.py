"""Measures standard, PGD and verified error of a trained network, example by example."""
