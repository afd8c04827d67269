"""The few operations worth more than one implementation; each room has a reference and fast paths."""
