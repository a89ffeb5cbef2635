"""One file per experiment: `get_config(variant)`. `common` and `recipes` hold the shared parts."""
