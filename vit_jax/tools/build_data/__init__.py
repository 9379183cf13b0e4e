"""Data sets of one's own images."""
