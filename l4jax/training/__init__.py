"""Objectives, optimizers, and the one loop that runs any of them."""
