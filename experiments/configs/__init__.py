"""One file per experiment: `get_config(variant)`. Shared parts are in `common`."""
