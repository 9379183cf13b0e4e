"""A web page to drop pictures on.

It shows the classes that `predict` gives for the file, and where the model
looks, at any resolution in whole patches. `Viewer` is what the page shows;
the rest is the page, on gradio, which an extra installs.
"""

import contextlib
import functools
import html
import os
import pathlib
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from vit_jax import pretrained
from vit_jax.data import preprocess
from vit_jax.errors import UserError, needs_extra
from vit_jax.evaluation import attention_maps, predict
from vit_jax.pretrained.loaded import HEAD_OF_ZEROS, fold_normalization
from vit_jax.state import as_lazy, flatten
from vit_jax.training.steps import normalize

TOP = 5  # classes shown
_FACTORS = (1 / 2, 3 / 4, 1, 3 / 2, 2)  # of the checkpoint's resolution
# The attention weights of a layer of ViT-L/16 are 164 MB then.
_MOST_PATCHES = 1600
_SHOWN_SIDE = 480  # pixels, at least, of the picture with the map
_FILE_LIMIT = "64mb"

Size = tuple[int, int]


class View(NamedTuple):
  """What there is to say of a picture.

  Attributes:
    classes: as those of `predict.predict`; none without a head.
    seen: u8[h w 3], the pixels that the model gets, enlarged, dark where it
      does not look; None for a ResNet.
  """

  classes: list[dict[str, Any]]
  seen: np.ndarray | None


class Viewer:
  """A checkpoint's model, at whichever resolution is asked for.

  Attributes:
    about: what was loaded.
    note: what it cannot show, and why; "" for nothing.
    sizes: [(h, w)] in pixels that it offers.
    attends: whether there is attention to show.
    lock: held while it computes, one picture at a time.
  """

  def __init__(self, source: str, class_names: str | None = None):
    """Loads the model.

    Raises:
      UserError: no checkpoint, or one with nothing to show.
    """
    weights = pretrained.read(source)
    self._model = pretrained.assemble(weights)
    # What was read is used at every resolution, even if the files change.
    self._weights = fold_normalization(weights)._replace(
      params={
        path: as_lazy(x) for path, x in flatten(self._model.params).items()
      },
      notes=(),
    )
    self.about = about = self._model.config
    self._names = predict.read_names(class_names, about)
    self.attends = bool(self._model.model.num_layers)
    self._has_head = HEAD_OF_ZEROS not in self._model.notes
    self.note = ""
    if not about.num_classes:
      self._has_head = False
      self.note = "no head: there are no classes to show; fine-tune it first"
    elif not self._has_head:
      self.note = HEAD_OF_ZEROS
    if not self.attends:
      no_map = f"{about.variant} is a ResNet, which has no attention"
      if not self._has_head:
        raise UserError(f"{source}: {self.note}; and {no_map}")
      self.note = f"{no_map}: classes only"
    self.sizes = list_sizes(about)
    self.lock = threading.Lock()
    self._at = functools.cache(self._load)

  def view(self, encoded: bytes, name: str, size: Size) -> View:
    """Looks at a picture.

    Args:
      encoded: the bytes of an image file.
      name: what errors call it.
      size: one of `sizes`.

    Raises:
      UserError: no image, or one that is too large.
    """
    # Outside of the lock: a mistake shows at once.
    picture = preprocess.decode_image(encoded, name)
    with self.lock:
      model, look = self._at(size)
      about = model.config
      pixels = preprocess.preprocess_image(
        picture, about.preprocess, about.image_size, name
      )
      classes = []
      if self._has_head:
        (classes,) = predict.classify(model, pixels[None], self._names, TOP)
      if look is None:
        return View(classes, None)
      seen = np.asarray(look(jnp.asarray(normalize(pixels[None]))).maps[0])
      return View(classes, attention_maps.overlay(_enlarge(pixels), seen))

  def _load(self, size):
    """Returns the model for images of a size, and what looks, compiled once."""
    model = self._model
    if size != self.about.image_size:
      model = pretrained.assemble(self._weights, image_size=size)
    return model, attention_maps.make_look(model) if self.attends else None


def list_sizes(about: pretrained.Config) -> list[Size]:
  """Returns sizes (h, w) in pixels around the checkpoint's, in whole patches.

  Those with very many patches are left out, but for the checkpoint's own.
  """
  sizes = {about.image_size}
  for factor in _FACTORS:
    height, width = (max(1, round(factor * side)) for side in about.grid)
    if factor != 1 and height * width <= _MOST_PATCHES:
      sizes.add((height * about.patch, width * about.patch))
  return sorted(sizes)


def _enlarge(pixels):
  """Returns u8[h w 3] in which a small image's pixels are seen as such."""
  height, width = pixels.shape[:2]
  factor = -(-_SHOWN_SIDE // max(height, width))
  return np.array(
    Image.fromarray(pixels).resize(
      (width * factor, height * factor), Image.Resampling.NEAREST
    )
  )


@contextlib.contextmanager
def serve(
  source: str,
  class_names: str | None = None,
  host: str = "127.0.0.1",
  port: int | None = None,
  share: bool = False,
) -> Iterator[str]:
  """Serves the page while its context lasts; yields its address.

  Ctrl-C or SIGTERM ends the context, and is not raised again; see `launch`.
  """
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  # What is uploaded goes into a folder that is ours to delete: gradio leaves it
  # where a page is open at the end.
  base = os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()
  os.makedirs(base, exist_ok=True)
  with tempfile.TemporaryDirectory(
    prefix="vit_jax_demo_", dir=base, ignore_cleanup_errors=True
  ) as folder:
    os.environ["GRADIO_TEMP_DIR"] = folder
    viewer, page = _start(source, class_names, host, port, share)
    try:
      yield page.local_url
    except KeyboardInterrupt:
      pass
    finally:
      page.close(verbose=False)
      # Ending amid a computation, Python would abort in C++.
      with viewer.lock:
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
    class_names: a text file with a name a line, for weights that have none.
    host: the address to listen at; others than this machine reach 0.0.0.0.
    port: unset: the first free one from 7860 on.
    share: whether gradio's servers also give it a public address.

  Returns:
    gradio's Blocks; `.close()` ends it.

  Raises:
    UserError: the address is taken, or see `Viewer`.
  """
  return _start(source, class_names, host, port, share)[1]


def _start(source, class_names, host, port, share):
  """Returns the viewer, and its page, served; see `launch`."""
  gradio = _import_gradio()
  _check_address(host, port)
  viewer = Viewer(source, class_names)
  page = _make_page(gradio, viewer)
  try:
    page.launch(
      server_name=host,
      server_port=port or None,
      share=share,
      quiet=True,
      prevent_thread_lock=True,
      ssr_mode=False,  # it would take Node.js
      run_history=False,
      footer_links=[],
      height=900,  # in a notebook
      max_file_size=_FILE_LIMIT,
      css=_CSS,
      theme=_make_theme(gradio),
    )
  except OSError as e:  # another program was faster, or has all ports
    raise UserError(f"the page cannot be served: {e}") from e
  return viewer, page


def _import_gradio() -> Any:
  # Read when it is imported: nothing is told to anybody.
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
  try:
    import gradio  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError as e:
    raise needs_extra("vit-jax demo", "gradio") from e
  return gradio


def _check_address(host, port):
  """Raises a UserError where nothing can listen."""
  try:
    socket.create_server((host, port or 0)).close()
  except (OSError, OverflowError) as e:
    raise UserError(
      f"nothing can listen at {host}{f', port {port}' if port else ''}: "
      f"{getattr(e, 'strerror', None) or e}; give another --host or --port, or "
      "leave them out"
    ) from e


# --- the page ---

_CSS = """
#classes table {width: 100%; border-collapse: collapse; margin-top: .75rem}
#classes :is(table, tbody, tr, th, td) {border: 0 !important}
#classes :is(th, td) {padding: .3rem .25rem}
#classes p {margin-top: .75rem}
#classes th {text-align: left; font-weight: normal; overflow-wrap: anywhere}
#classes td {text-align: right; font-variant-numeric: tabular-nums}
#classes td:first-of-type {width: 40%}
#classes meter {width: 100%}
#classes [role=alert] {font-weight: 600}
"""
_WAITING = "<p>Drop, paste or choose a picture.</p>"


def _make_theme(gradio):
  """Returns fonts that are on the reader's machine, and greys to be read."""
  return gradio.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["monospace"]
  ).set(
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
  )


def _make_page(gradio, viewer):
  """Returns the page, which nobody serves yet."""
  about = viewer.about
  sizes = {_name_size(size): size for size in viewer.sizes}
  own = _name_size(about.image_size)

  # With preprocess=False it is told where the very file is that was given;
  # gradio would open it before, and fail in its own words.
  def show(picture, label):
    size = sizes.get(label)
    if not picture or not picture.get("path") or not size:
      return _WAITING, None
    name = picture.get("orig_name") or "the picture"
    try:
      encoded = pathlib.Path(picture["path"]).read_bytes()
      found = viewer.view(encoded, name, size)
    except UserError as e:
      return f'<p role="alert">{html.escape(str(e))}</p>', None
    return _format_classes(found.classes, viewer.note), found.seen

  with gradio.Blocks(
    title=f"{about.variant}: what it sees",
    analytics_enabled=False,
    delete_cache=(3600, 3600),  # seconds: pictures do not stay
  ) as page:
    gradio.Markdown(f"# {about.variant}: what it sees")
    with gradio.Row():
      with gradio.Column():
        picture = gradio.Image(
          label="Picture",
          sources=["upload", "clipboard"],
          buttons=[],
          height=320,
          alt_text="The picture that was given",
        )
        resolution = gradio.Radio(
          list(sizes),
          value=own,
          label=f"Resolution, in patches of {about.patch} px",
          info=f"The checkpoint's own is {own}.",
        )
      with gradio.Column():
        classes = gradio.HTML(
          _WAITING,
          label="Classes",
          show_label=True,
          container=True,
          padding=True,
          elem_id="classes",
        )
        seen = gradio.Image(
          label="Where the model looks",
          interactive=False,
          buttons=["fullscreen"],
          format="png",
          alt_text="What the model is given, dark where it does not look",
          visible=viewer.attends,
        )
    gradio.on(
      [picture.change, resolution.change],
      show,
      [picture, resolution],
      [classes, seen],
      preprocess=False,
      trigger_mode="always_last",
      concurrency_limit=1,
      api_visibility="private",
    )
  return page


def _name_size(size):
  height, width = size
  return f"{height} px" if height == width else f"{height} x {width} px"


def _format_classes(classes: Sequence[dict], note: str) -> str:
  """Returns HTML."""
  rows = [
    f'<tr><th scope="row">{html.escape(entry["name"])}</th>'
    f'<td><meter value="{entry["probability"]:.6f}" aria-hidden="true">'
    f"</meter></td><td>{entry['probability']:.2%}</td></tr>"
    for entry in classes
  ]
  label = "Classes and their probabilities"
  table = f'<table aria-label="{label}">{"".join(rows)}</table>' if rows else ""
  return table + (f"<p>{html.escape(note)}</p>" if note else "")
