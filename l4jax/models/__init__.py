"""Flax modules of the Llama families; start at `llama4`."""
