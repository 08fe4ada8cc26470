"""One built-in task per file; `shoal.training.task` finds them."""
