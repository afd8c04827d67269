"""Llama 4 and Llama 3 in JAX: convert, train, plan and serve on TPU pods; verify on a laptop."""
