"""Training: from a configuration and its data to a trained state."""
