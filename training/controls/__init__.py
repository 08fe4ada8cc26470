"""One method of error control per file; `shoal.training.control` finds them."""
