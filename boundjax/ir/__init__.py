"""The language of graphs: nodes, the families of ops, and the one table of ops."""
