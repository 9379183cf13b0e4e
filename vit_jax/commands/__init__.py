"""One module a command: `add_flags(parser)` and `run(args)`.

A command's flags are read without JAX or TensorFlow, so that `--help` is quick:
`run` imports what it needs. Only `vit_jax.__main__` imports these modules.
"""
