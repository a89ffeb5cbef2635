"""One file per experiment: `get_config(variant)`. What they share is in `common` and `recipes`."""
