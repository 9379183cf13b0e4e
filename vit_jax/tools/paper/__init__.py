"""The paper's numbers, and what its models cost."""
