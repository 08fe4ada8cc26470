"""One way of exchange per file; the contract is `shoal.training.exchange`."""
