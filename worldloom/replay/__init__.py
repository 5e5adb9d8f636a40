"""Replay: rows in, windows out."""
