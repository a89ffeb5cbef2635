"""Networks over products of perturbed values, attention, normalisation, selections."""

from network import Network

NETWORKS: tuple[Network, ...] = ()
