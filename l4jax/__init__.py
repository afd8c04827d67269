"""Llama 4 and Llama 3 in JAX: exact models, checkpoints, training and generation."""
