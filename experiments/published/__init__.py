"""Published rows: the papers' tables, and how close a run comes to them."""
