"""The `demo` command: a gradio page that classifies uploaded pictures."""

import contextlib
import functools
import html
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from vit_jax import pretrained
from vit_jax.data import preprocess
from vit_jax.errors import UserError, needs_extra
from vit_jax.evaluation import attention_maps, predict
from vit_jax.pretrained.loaded import HEAD_OF_ZEROS
from vit_jax.training.steps import normalize

TOP = 5  # classes shown
_FACTORS = (1 / 2, 3 / 4, 3 / 2, 2)  # of the checkpoint's resolution
# With so many patches, a layer's attention weights in ViT-L/16 take 164 MB.
_MOST_PATCHES = 1600
_SHOWN_SIDE = 480  # least pixels of the longer side of the model's input
# Labels and buttons are above pictures, not on their corners. Pictures of a few
# pixels are enlarged.
_CSS = """
.above { display: flex; flex-direction: column; }
.above label.float { position: static; align-self: start; }
.above .image-container {
  position: static; flex: 1; height: auto; min-height: 0;
}
.above .image-frame, .above img {
  width: 100%; height: 100%; object-fit: contain;
}
"""


class Viewer:
  """A checkpoint's model, at any of a few resolutions.

  Attributes:
    about: the configuration of the checkpoint.
    attends: whether the model has attention.
    sizes: [(h, w)] in pixels, the available resolutions.
    lock: held during computation, because it runs one picture at a time.
  """

  def __init__(self, source: str, class_names: str | None = None):
    """Loads the model.

    Raises:
      UserError: no checkpoint, or one without a trained head.
    """
    self._weights = pretrained.read(source)
    self._at = functools.lru_cache(maxsize=2)(self._load)
    self.about = pretrained.describe(self._weights)
    self._names = predict.read_names(class_names, self.about)
    model, look = self._at(self.about.image_size)
    if not self.about.num_classes or HEAD_OF_ZEROS in model.notes:
      raise UserError(
        f"{source} has no trained head and so no classes to show; fine-tune it"
      )
    self.attends = look is not None
    self.sizes = list_sizes(self.about)
    self.lock = threading.Lock()

  def _load(self, size):
    model = pretrained.assemble(self._weights, image_size=size)
    attends = model.model.num_layers
    return model, attention_maps.make_look(model) if attends else None

  def view(
    self, file: str, name: str, size: tuple[int, int]
  ) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray | None]:
    """Classifies an image file.

    Args:
      file: its path.
      name: its name in error messages.
      size: one of `sizes`.

    Returns:
      The classes as in `predict.predict`; u8[h w 3], the preprocessed image,
      enlarged; and the same, darkened where attention is low, None without
      attention.

    Raises:
      UserError: not an image, or too large an image.
    """
    with open(file, "rb") as f:
      picture = preprocess.decode_image(f.read(), name)
    with self.lock:
      model, look = self._at(size)
      text = model.config.preprocess
      pixels = preprocess.preprocess_image(picture, text, size, name)
      (classes,) = predict.classify(model, pixels[None], self._names, TOP)
      factor = -(-_SHOWN_SIDE // max(size))
      large = pixels.repeat(factor, 0).repeat(factor, 1)
      if look is None:
        return classes, large, None
      (seen,) = np.asarray(look(jnp.asarray(normalize(pixels[None]))).maps)
    return classes, large, attention_maps.overlay(large, seen)


def list_sizes(about: pretrained.Config) -> list[tuple[int, int]]:
  """Returns sizes (h, w) in pixels around the checkpoint's, in whole patches.

  Those with too many patches are left out, except the checkpoint's own.
  """
  sizes = {about.image_size}
  for factor in _FACTORS:
    height, width = (max(1, round(factor * side)) for side in about.grid)
    if height * width <= _MOST_PATCHES:
      sizes.add((height * about.patch, width * about.patch))
  return sorted(sizes)


@contextlib.contextmanager
def serve(source: str, **options: Any) -> Iterator[str]:
  """Serves the page while its context lasts; yields its address.

  Ctrl-C or SIGTERM ends the context, and is not raised again. Uploads are then
  deleted. The arguments are those of `launch`.
  """
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    os.environ["GRADIO_TEMP_DIR"] = folder
    page = launch(source, **options)
    try:
      yield page.local_url
    except KeyboardInterrupt:
      pass
    finally:
      page.close(verbose=False)
      # If Python exited during a computation, C++ would abort.
      with page.viewer.lock:
        pass


def launch(
  source: str,
  class_names: str | None = None,
  host: str = "127.0.0.1",
  port: int | None = None,
  share: bool = False,
) -> Any:
  """Starts the page and returns it; in a notebook it appears below the cell.

  Args:
    source: whatever `vit_jax.load` reads.
    class_names: a text file with one name per line, for weights without names.
    host: the address to listen on; 0.0.0.0 for other machines as well.
    port: None for the first free one from 7860 on.
    share: whether gradio's servers also give it a public address.

  Returns:
    gradio's Blocks; `.close()` ends it.

  Raises:
    UserError: the address is taken, or see `Viewer`.
  """
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by the import
  try:
    import gradio  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError as e:
    raise needs_extra("vit-jax demo", "gradio") from e
  try:
    socket.create_server((host, port or 0)).close()
  except (OSError, OverflowError) as e:
    raise UserError(
      f"cannot listen on {host}, port {port or 'any'}: {e}; give another "
      "--host or --port"
    ) from e
  page = _make_page(gradio, Viewer(source, class_names))
  themes = gradio.themes  # pyright: ignore[reportPrivateImportUsage]
  page.launch(
    server_name=host,
    server_port=port or None,
    share=share,
    quiet=True,
    prevent_thread_lock=True,
    ssr_mode=False,  # it would need Node.js
    run_history=False,
    footer_links=[],
    max_file_size="64mb",
    height=900,  # in a notebook
    css=_CSS,
    # System fonts, because the default ones are loaded from Google.
    theme=themes.Default(font="system-ui", font_mono="monospace"),
  )
  return page


def _make_pictures(gradio, attends):
  """Returns the components of the model's input and of the attention map."""
  darkened = "The preprocessed image, darkened by the attention map"
  return [
    gradio.Image(
      label=label,
      format="png",
      interactive=False,
      buttons=["fullscreen"],
      alt_text=text,
      visible=visible,
      elem_classes="above",
      min_width=120,  # beside each other on a phone
    )
    for label, text, visible in (
      ("Model input", "The preprocessed image", True),
      ("Attention map", darkened, attends),
    )
  ]


def _make_page(gradio, viewer):
  sizes = {f"{h} x {w} px": (h, w) for h, w in viewer.sizes}
  own = "{} x {} px".format(*viewer.about.image_size)

  # Because of preprocess=False, it gets the uploaded file, like `predict`.
  def show(picture, label):
    if not picture:
      return None, None, None
    try:
      name = picture.get("orig_name") or "the picture"
      found, *shown = viewer.view(picture["path"], name, sizes[label])
    except UserError as e:
      text = html.escape(str(e))
      raise gradio.Error(text, duration=None, print_exception=False) from e
    classes = {}
    for entry in found:
      name = entry["name"]
      while name in classes:  # two classes may have the same name
        name += " "
      classes[name] = entry["probability"]
    return classes, *shown

  title = f"{viewer.about.variant}: image classification"
  # Uploads are deleted after an hour.
  with gradio.Blocks(title=title, delete_cache=(3600, 3600)) as page:
    gradio.Markdown(f"# {title}")
    with gradio.Row():
      with gradio.Column():
        picture = gradio.Image(
          label="Picture",
          sources=["upload", "clipboard"],
          buttons=[],
          height=320,
          alt_text="The picture that was given",
          elem_classes="above",
        )
        size = gradio.Radio(list(sizes), value=own, label="Resolution")
      with gradio.Column():
        classes = gradio.Label(label="Classes")
        with gradio.Row():
          inputs, seen = _make_pictures(gradio, viewer.attends)
    gradio.on(
      [picture.change, size.change],
      show,
      [picture, size],
      [classes, inputs, seen],
      preprocess=False,
      trigger_mode="always_last",
      concurrency_limit=1,
      api_visibility="private",
    )
  page.viewer = viewer
  return page
