"""Data sets of your own images."""
