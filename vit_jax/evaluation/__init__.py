"""Evaluators, which yield (name, value) pairs, and uses of saved weights."""
