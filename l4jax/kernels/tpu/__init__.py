"""Kernels for TPUs, each behind an entry point in `kernels` that has its reference."""
