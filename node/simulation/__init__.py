"""The daemons' cores on one simulated network, off one heap: same seed, same trace."""
