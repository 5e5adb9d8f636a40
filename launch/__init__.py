"""Commands, run as `worldloom NAME` or `python -m launch.NAME`."""
