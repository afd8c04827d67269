"""Straight-line recipes, each runnable on a laptop by default."""
