"""Networks over smooth activations and elementwise functions."""

from network import Network

NETWORKS: tuple[Network, ...] = ()
