"""Measured comparisons: each a command that prints a table. Medians, side by side in one run; never a test."""
