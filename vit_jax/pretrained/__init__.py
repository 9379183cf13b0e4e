"""Other people's weights: found, read, and written back in their formats."""
