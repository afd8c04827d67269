"""Recorded plans: what the TPU compiler says of every model on every generation."""
