"""Ways to reach other peers: gRPC carries, libp2p finds."""

import os

# gRPC's C core writes every failed handshake to stderr, and every probe of ours is one to it:
# the daemon's log is not for that. Before the first import of grpc.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
