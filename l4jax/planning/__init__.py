"""Compiling for a TPU pod that nobody holds: what fits, what moves, how fast it can be."""
