"""Vision Transformers in JAX: pre-train, fine-tune at high resolution, use."""

__version__ = "0.1.0"
