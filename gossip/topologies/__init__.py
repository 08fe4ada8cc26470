"""One shape per file; gossip/topology.py scans this folder."""
