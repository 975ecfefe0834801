"""Adapters: one folder per program that runs the models. No host is imported by anything else."""
