"""A run from its configuration to its last checkpoint; the in-process trainer."""
