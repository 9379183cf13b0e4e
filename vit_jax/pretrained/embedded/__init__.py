"""A small trained model in the package, which loads without a network.

ViT-N_8-digits is the fine-tuned model of `make quickstart`: 0.8 M parameters,
ten handwritten digits at 48 px, 93.9 % accuracy on 797 held-out images. It is
in timm's format, in float16, and was made by

  make quickstart
  vit-jax convert runs/quickstart/finetune ViT-N_8-digits --to=timm
  cd ViT-N_8-digits && python -c '
  from safetensors.numpy import load_file, save_file
  arrays = load_file("model.safetensors")
  half = {name: x.astype("float16") for name, x in arrays.items()}
  save_file(half, "model.safetensors", {"format": "pt"})'
"""

import pathlib

from vit_jax.pretrained.weights import Weights

_FOLDER = pathlib.Path(__file__).parent
MODELS = {
  file.parent.name: file for file in _FOLDER.glob("*/model.safetensors")
}


def restore(weights: Weights) -> Weights:
  """Returns weights with the run's settings, if the file is one of `MODELS`.

  timm's format implies timm's preprocessing and resizing, so the run's are
  restored here. The source becomes the model's name.
  """
  path = pathlib.Path(weights.source)
  if path not in MODELS.values():
    return weights
  return weights._replace(
    source=path.parent.name,
    preprocess="resize(size)",
    resize="corner_aligned",
    notes=(),
  )
