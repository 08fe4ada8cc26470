"""One file per benchmark, each with `run(json) -> exit code`."""
