"""Certificates for a model and a batch."""
