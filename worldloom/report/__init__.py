"""Reports of a run: metrics, a display, pictures and a page."""
