"""One inner optimizer per file; `shoal.training.optimizer` finds them."""
