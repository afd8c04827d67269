"""The operations worth more than one implementation: each a reference and fast paths."""
