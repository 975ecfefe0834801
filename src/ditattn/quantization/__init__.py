"""Weights in fewer bits: which linear layers, in what format, and the way back. Knows modules of torch and families, no host."""
