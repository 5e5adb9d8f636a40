"""Trained agents for other people: a directory with a model card, and the Hugging Face Hub."""
