"""Text tables."""

from vit_jax.tools import text


def test_columns_are_as_wide_as_their_widest_text():
  rows = [("", "batch", "ms", "note"), ("ViT-B/16", "8", "1.25", "")]
  assert text.format_columns(rows, "<>><") == [
    "          batch    ms  note",
    "ViT-B/16      8  1.25",
  ]
  assert text.format_columns(rows, "<")[0] == "          batch  ms    note"
