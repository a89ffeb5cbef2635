"""Published rows: the papers' tables, and how near a run comes to them."""
