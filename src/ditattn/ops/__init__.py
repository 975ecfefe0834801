"""How to compute: one folder per operation, with its contract, its reference and one file per technique."""
