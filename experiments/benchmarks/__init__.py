"""Measurements against other implementations, alternated in one run."""
