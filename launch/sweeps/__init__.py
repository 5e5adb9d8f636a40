"""The parts of launch.sweep."""
