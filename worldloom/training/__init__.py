"""Replay, rollouts, clocks and checkpoints: what both the in-process trainer and the Ray actors are made of."""
