"""Replay: stores rows of experience and draws windows of consecutive rows."""
