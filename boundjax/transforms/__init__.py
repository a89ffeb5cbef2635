"""The walks over a graph, one file each."""
