"""The papers' training recipes: each function changes a ConfigDict in place, for its arguments."""
