"""The `data build` command: data sets of your images."""
