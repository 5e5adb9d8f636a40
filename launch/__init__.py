"""Commands, run as python -m launch.NAME: train, evaluate, imagine, status."""
