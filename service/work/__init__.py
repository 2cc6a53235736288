"""Pieces of work that the engine advances, a kind a file."""
