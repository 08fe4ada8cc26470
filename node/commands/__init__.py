"""One file per command; node/cli.py finds them by looking into this folder."""
