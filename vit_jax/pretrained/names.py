"""Short names of published checkpoints, and their public addresses.

The addresses come from, and have only been copied from:
  google-research/vision_transformer, README.md: the buckets, AugReg's
    recommended checkpoints and their fine-tuned versions at 384;
  google-research/big_vision, models/vit.py: AugReg's B/8, the S/16 baselines;
  google-research/big_transfer, README.md and bit_pytorch/models.py: BiT;
  huggingface/pytorch-image-models, vision_transformer.py and
    vision_transformer_hybrid.py: AugReg at 224, SAM; resnetv2.py: BiT-M;
  download scripts of public repositories, where those name only the bucket:
    imagenet21k, imagenet21k+imagenet2012, the rest of SAM and GSAM.
None of these publishes digests.
"""

from typing import NamedTuple

_VIT = "gs://vit_models"


class Published(NamedTuple):
  """A checkpoint's address, and the SHA-256 of its bytes where it is known."""

  address: str
  sha256: str | None = None


def _list_plain() -> dict[str, str]:
  """Returns {name: address} where the file is named after the variant."""
  folders = {
    "imagenet21k": (
      "ViT-B_16 ViT-B_32 ViT-L_16 ViT-L_32 ViT-H_14 R50+ViT-B_16"
    ),
    # At 384, or at 224 where the name says so.
    "imagenet21k+imagenet2012": (
      "ViT-B_16 ViT-B_16-224 ViT-B_32 ViT-L_16 ViT-L_16-224 ViT-L_32"
      " R50+ViT-B_16"
    ),
    "sam": "ViT-S_16 ViT-B_16 ViT-B_32 ViT-L_16 ViT-L_32",
    "gsam": "ViT-S_16 ViT-S_32 ViT-B_16 ViT-B_32",
  }
  return {
    f"{model}-{folder}": f"{_VIT}/{folder}/{model}.npz"
    for folder, models in folders.items()
    for model in models.split()
  }


def _augreg(model, augmentation, decay, drop="0.0", lr=None, size=None) -> str:
  """Returns an AugReg address; with `lr` and `size`, the fine-tuned one."""
  # Dropout and stochastic depth were only ever used together.
  address = (
    f"{_VIT}/augreg/{model}-i21k-300ep-lr_0.001-aug_{augmentation}"
    f"-wd_{decay}-do_{drop}-sd_{drop}"
  )
  if size:
    address += f"--imagenet2012-steps_20k-lr_{lr}-res_{size}"
  return f"{address}.npz"


def _list_augreg() -> dict[str, str]:
  """Returns {name: address} of AugReg's ImageNet-21k models and fine-tuned.

  VARIANT-augreg is the recommended pre-trained checkpoint,
  VARIANT-augreg-imagenet2012-SIZE a fine-tuned one. At 224 the fine-tuned ones
  do not always start from the recommended recipe: they are those that timm has.
  """
  pretrained = {
    "R+ViT-Ti_16": ("R_Ti_16", "none", "0.03"),
    "R26+ViT-S_32": ("R26_S_32", "light1", "0.1"),
    "R50+ViT-L_32": ("R50_L_32", "medium1", "0.1", "0.1"),
    "ViT-Ti_16": ("Ti_16", "none", "0.03"),
    "ViT-S_32": ("S_32", "none", "0.1"),
    "ViT-S_16": ("S_16", "light1", "0.03"),
    "ViT-B_32": ("B_32", "light1", "0.1"),
    "ViT-B_16": ("B_16", "medium1", "0.1"),
    "ViT-B_8": ("B_8", "medium2", "0.1"),
    "ViT-L_16": ("L_16", "strong1", "0.1"),
  }
  lr_at_384 = {
    "R+ViT-Ti_16": "0.03",
    "R26+ViT-S_32": "0.01",
    "R50+ViT-L_32": "0.01",
    "ViT-Ti_16": "0.03",
    "ViT-S_32": "0.01",
    "ViT-S_16": "0.03",
    "ViT-B_32": "0.01",
    "ViT-B_16": "0.03",
    "ViT-L_16": "0.01",
  }
  at_224 = {
    "R+ViT-Ti_16": ("R_Ti_16", "none", "0.03", "0.0", "0.03"),
    "R26+ViT-S_32": ("R26_S_32", "light0", "0.03", "0.1", "0.03"),
    "R50+ViT-L_32": ("R50_L_32", "medium1", "0.1", "0.1", "0.01"),
    "ViT-Ti_16": ("Ti_16", "none", "0.03", "0.0", "0.03"),
    "ViT-S_32": ("S_32", "light1", "0.03", "0.0", "0.03"),
    "ViT-S_16": ("S_16", "light1", "0.03", "0.0", "0.03"),
    "ViT-B_32": ("B_32", "medium1", "0.03", "0.0", "0.03"),
    "ViT-B_16": ("B_16", "medium1", "0.1", "0.0", "0.01"),
    "ViT-B_8": ("B_8", "medium1", "0.1", "0.0", "0.01"),
    "ViT-L_16": ("L_16", "medium1", "0.1", "0.1", "0.01"),
  }
  found = {}
  for variant, recipe in pretrained.items():
    name = f"{variant}-augreg"
    found[name] = _augreg(*recipe)
    tuned = _augreg(*at_224[variant], size=224)
    found[f"{name}-imagenet2012-224"] = tuned
    if variant in lr_at_384:
      tuned = _augreg(*recipe, lr=lr_at_384[variant], size=384)
      found[f"{name}-imagenet2012-384"] = tuned
  return found


def _list_bit() -> dict[str, str]:
  """Returns {name: address} of BiT: S from ImageNet, M from ImageNet-21k."""
  models = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
  names = [f"BiT-S-{model}" for model in models]
  names += [f"BiT-M-{model}" for model in models]
  names += [f"BiT-M-{model}-ILSVRC2012" for model in models]
  return {name: f"gs://bit_models/{name}.npz" for name in names}


def _list_big_vision() -> dict[str, str]:
  """Returns {name: address} under the names that big_vision gives them."""
  found = {
    f"i1k-s16-{epochs}ep": f"gs://big_vision/vit_s16_i1k_{epochs}ep.npz"
    for epochs in (90, 150, 300)
  }
  augreg = _list_augreg()
  for size in ("Ti/16", "S/32", "S/16", "B/32", "B/16", "B/8", "L/16"):
    variant = "ViT-" + size.replace("/", "_")
    found[f"howto-i21k-{size}"] = augreg[f"{variant}-augreg"]
  return found


PUBLISHED: dict[str, Published] = {
  name: Published(address)
  for names in (
    _list_plain(),
    _list_augreg(),
    _list_bit(),
    _list_big_vision(),
  )
  for name, address in names.items()
}
