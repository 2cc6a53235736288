"""Measurements: a command each, peers in the same run, one JSON line at the end."""
