"""The `verify` command: comparison of features with published values.

The values are Meta's, from the conversion script of DINOv3 in transformers.
They are the first five numbers of the class token and of the first patch, both
after the last LayerNorm, for one photograph at 224 pixels.
"""

from typing import Any

import numpy as np

from vit_jax import pretrained
from vit_jax.data import preprocess
from vit_jax.errors import UserError
from vit_jax.training.steps import normalize

PICTURE = "http://images.cocodataset.org/val2017/000000039769.jpg"
_SIZE = 224
_PREPROCESS = "resize(size, method='bilinear', antialias=True)"
# Pixels are rounded to 1/255 here, which moves features this much at most
# (an estimate, because none of these models was available for tests).
TOLERANCE = 0.05

# (variant, MLP) -> name, the class token's and the first patch's first numbers.
PUBLISHED = {
  ("ViT-S_16", "plain"): (
    "DINOv3 ViT-S/16",
    (0.46356, -0.41561, 0.40824, -0.12661, -0.28664),
    (-0.03875, -0.25090, -0.01639, -0.45547, 0.57158),
  ),
  ("ViT-S_16", "gated"): (
    "DINOv3 ViT-S+/16",
    (-0.47135, -1.36578, -0.31798, 0.37722, -0.76909),
    (0.14455, -0.38812, -0.39343, -0.15770, -0.60038),
  ),
  ("ViT-B_16", "plain"): (
    "DINOv3 ViT-B/16",
    (1.03464, -0.18061, -0.34102, -0.06638, -0.01138),
    (-0.08252, -0.45627, -0.72803, -0.43068, -0.15288),
  ),
  ("ViT-L_16", "plain"): (
    "DINOv3 ViT-L/16",
    (0.48453, -0.58221, 0.48064, 0.59204, 0.94517),
    (-0.21137, -0.49086, -0.25713, 0.10176, 0.15451),
  ),
  ("ViT-w1280d32m5120h20_16", "gated"): (
    "DINOv3 ViT-H+/16",
    (-0.06458, -0.14887, -0.62152, 0.63488, 0.15270),
    (-0.09382, 0.28741, -0.05003, 0.42804, 0.09456),
  ),
  ("ViT-w4096d40m8192h32_16", "gated"): (
    "DINOv3 ViT-7B/16",
    (0.27544, -0.26135, 0.06777, 0.04994, -0.15875),
    (0.04444, -0.05254, 0.07078, -0.06511, -0.02655),
  ),
}


def verify(source: str, image: str) -> dict[str, Any]:
  """Compares features of one photograph with those that were published.

  Args:
    source: whatever `vit_jax.load` reads, of one of the models in `PUBLISHED`.
    image: the file of `PICTURE`.

  Returns:
    {"model", "rows": [{"token", "published", "found"}], "difference": the
    largest, "equal": whether it is at most `TOLERANCE`}.

  Raises:
    UserError: another model, or no such file.
  """
  weights = pretrained.read(source)
  about = pretrained.describe(weights)
  key = (about.variant, about.switches.get("mlp", "plain"))
  if about.switches.get("rope") != "dinov3" or key not in PUBLISHED:
    known = ", ".join(name for name, *_ in PUBLISHED.values())
    raise UserError(
      f"{source} is {about.variant}, for which no values are published; "
      f"there are values for {known}"
    )
  name, *published = PUBLISHED[key]
  pixels = preprocess.preprocess_image(image, _PREPROCESS, _SIZE)
  model = pretrained.assemble(weights, image_size=_SIZE, num_classes=0)
  batch = normalize(pixels[None])
  tokens = (
    model.features(batch, what="cls")[0],
    model.features(batch, what="patches")[0, 0, 0],
  )
  rows = [
    {"token": token, "published": list(given), "found": np.float64(x[:5])}
    for token, given, x in zip(
      ("class token", "first patch"), published, tokens, strict=True
    )
  ]
  difference = max(
    float(np.abs(row["found"] - row["published"]).max()) for row in rows
  )
  for row in rows:
    row["found"] = [round(x, 5) for x in row["found"].tolist()]
  is_equal = difference <= TOLERANCE
  return {
    "model": name,
    "rows": rows,
    "difference": difference,
    "equal": is_equal,
  }
