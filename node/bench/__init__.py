"""One file per benchmark, each with `register(parser)` and `run(args) -> exit code`."""
