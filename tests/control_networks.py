"""Networks over loops, branches, gathers and scatters."""

from network import Network

NETWORKS: tuple[Network, ...] = ()
