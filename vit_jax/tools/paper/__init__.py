"""The paper's tables and protocol, and the compute of its models."""
