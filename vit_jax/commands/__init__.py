"""One module per command, with `add_flags(parser)` and `run(args)`.

Flags are parsed without importing JAX or TensorFlow, so that `--help` is fast;
`run` imports what it needs. Only `vit_jax.__main__` imports these modules.
"""
