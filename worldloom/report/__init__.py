"""What a run tells: metrics, a display, pictures and a page."""
