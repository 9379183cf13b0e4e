"""`vit-jax bench step`: measure the train step on the local devices."""

from vit_jax.commands import flags
from vit_jax.errors import RunStopped


def add_flags(parser):
  parser.add_argument(
    "--variant", default="ViT-L_16", help="one or more: ViT-B_16,ViT-L_16"
  )
  flags.add_image_size(parser, default=224)
  parser.add_argument(
    "--batch_size", type=int, default=64, help="over all devices"
  )
  parser.add_argument("--num_classes", type=int, default=18291)
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--dtype", default="bfloat16", help="or float32")
  parser.add_argument("--remat", default="none", help="or dots, full")
  parser.add_argument(
    "--inference", action="store_true", help="time the forward pass only"
  )
  parser.add_argument(
    "--attention",
    default="fused",
    help="fused (a kernel, cuDNN's on GPUs) or plain (compiled by XLA)",
  )
  parser.add_argument("--beside", help="timm: also measure timm's model")
  flags.add_json(parser)


def run(args):
  from vit_jax.tools.bench import step

  variants = args.variant.split(",")
  rows = step.bench(variants, **flags.options(args, "variant"))
  flags.print_result(args, rows, step.format_report)
  if all("error" in row for row in rows if row["code"] == "vit_jax"):
    raise RunStopped("no step was measured")
