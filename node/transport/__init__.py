"""Ways to reach other peers: gRPC carries, libp2p finds."""
