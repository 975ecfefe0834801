"""Measuring the kernels on the user's own machine: what `ditattn bench` and `benchmarks/` print."""
