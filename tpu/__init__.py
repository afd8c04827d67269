"""Recipes on TPU pods: capacity, manifests, restarts. Start at `launch.py`."""
