"""Short names of published checkpoints, and their public addresses.

The addresses are copied, without a test download, from:
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

_VIT = "gs://vit_models"


def _list_plain() -> dict[str, str]:
  """Returns {name: address} where the file is named after the variant."""
  folders = {
    "imagenet21k": (
      "ViT-B_16 ViT-B_32 ViT-L_16 ViT-L_32 ViT-H_14 R50+ViT-B_16"
    ),
    # At 384 pixels, or at 224 if the name ends with it.
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


# Columns: variant; recommended recipe and learning rate at 384, if any; recipe
# and learning rate at 224. A recipe is augmentation, weight decay, dropout.
_AUGREG = """
R+ViT-Ti_16   none    0.03 0.0 0.03  none    0.03 0.0 0.03
R26+ViT-S_32  light1  0.1  0.0 0.01  light0  0.03 0.1 0.03
R50+ViT-L_32  medium1 0.1  0.1 0.01  medium1 0.1  0.1 0.01
ViT-Ti_16     none    0.03 0.0 0.03  none    0.03 0.0 0.03
ViT-S_32      none    0.1  0.0 0.01  light1  0.03 0.0 0.03
ViT-S_16      light1  0.03 0.0 0.03  light1  0.03 0.0 0.03
ViT-B_32      light1  0.1  0.0 0.01  medium1 0.03 0.0 0.03
ViT-B_16      medium1 0.1  0.0 0.03  medium1 0.1  0.0 0.01
ViT-B_8       medium2 0.1  0.0 -     medium1 0.1  0.0 0.01
ViT-L_16      strong1 0.1  0.0 0.01  medium1 0.1  0.1 0.01
"""


def _list_augreg() -> dict[str, str]:
  """Returns {name: address} of AugReg's ImageNet-21k and fine-tuned models.

  VARIANT-augreg is the recommended pre-trained checkpoint,
  VARIANT-augreg-imagenet2012-SIZE a fine-tuned one. Those at 224 are timm's
  choice and do not always start from the recommended recipe.
  """
  found = {}
  for line in _AUGREG.split("\n")[1:-1]:
    variant, *recipe, lr_384, augmentation, decay, drop, lr_224 = line.split()
    file = variant.removeprefix("ViT-").replace("+ViT-", "_")
    name = f"{variant}-augreg"
    found[name] = _augreg(file, *recipe)
    tuned = {
      224: (augmentation, decay, drop, lr_224),
      384: (*recipe, lr_384),
    }
    for size, (*settings, lr) in tuned.items():
      if lr != "-":
        found[f"{name}-imagenet2012-{size}"] = _augreg(
          file, *settings, tuned=f"--imagenet2012-steps_20k-lr_{lr}-res_{size}"
        )
  return found


def _augreg(file, augmentation, decay, drop, tuned="") -> str:
  # AugReg always uses dropout and stochastic depth together.
  return (
    f"{_VIT}/augreg/{file}-i21k-300ep-lr_0.001-aug_{augmentation}-wd_{decay}"
    f"-do_{drop}-sd_{drop}{tuned}.npz"
  )


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


PUBLISHED: dict[str, str] = (
  _list_plain() | _list_augreg() | _list_bit() | _list_big_vision()
)
