"""The quickstart: the paper's main experiment, in minutes.

Pre-train on many cheap images, fine-tune at twice the resolution on few real
ones, and compare with training on those few alone, for as many steps.
"""

import logging
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vit_jax import config, data, files, models, sharding
from vit_jax.evaluation.evaluators import make_evaluate
from vit_jax.evaluation.predict import predict
from vit_jax.tools.figures import make_figures
from vit_jax.tools.text import format_columns
from vit_jax.train import train
from vit_jax.training import losses
from vit_jax.training.objectives import Classification

log = logging.getLogger(__name__)

REPORT = "report.json"
NUM_PREDICTIONS = 8  # held-out images that are classified at the end
# Class frequencies are estimated from so many training images.
PRIOR_EXAMPLES = 4000


def read_report(folder: Path) -> dict | None:
  """Returns the report of a quickstart that has finished."""
  report = folder / REPORT
  return files.read_json(report) if report.exists() else None


def quickstart(folder: Path) -> dict | None:
  """Runs all of it in `folder`; writes its report and pictures there.

  Interrupted, it continues where it stopped.

  Returns:
    The report, None if it was interrupted.
  """
  begin = time.monotonic()
  data_dir = str(folder / "data")
  for name in ("jft_like", "digits"):
    say(f"Data: {name}")
    data.prepare(name, data_dir)

  say("Pre-training on jft_like")
  pretrain = load("pretrain", data_dir)
  pretrained = train(pretrain, folder / "pretrain")

  say("Fine-tuning on digits, at twice the resolution")
  warm = {"init_from": str(folder / "pretrain")}
  finetune = load("finetune", data_dir, warm)
  finetuned = train(finetune, folder / "finetune")

  say("The same from scratch")
  scratch = train(load("finetune", data_dir), folder / "from_scratch")
  if None in (pretrained, finetuned, scratch):
    return None

  say("Predictions for held-out images")
  images, names = write_test_images(folder / "images", finetune)
  predictions = predict(str(folder / "finetune"), images, top=1)
  result = {
    "pretrain": summarize_pretraining(pretrain, pretrained),
    "finetune": summarize_finetuning(finetune, finetuned, scratch),
    "predictions": [
      {"image": p["image"], "label": name, **p["classes"][0]}
      for p, name in zip(predictions, names, strict=True)
    ],
  }
  say("Where the model looks")
  draw_figures(folder / "figures", str(folder / "finetune"), images)
  result["seconds"] = round(time.monotonic() - begin, 1)
  files.write_json(folder / REPORT, result)
  return result


def say(text: str) -> None:
  log.info("\n== %s", text)


def load(name, data_dir, overrides=None):
  """Loads one of the two configurations."""
  overrides = {"data_dir": data_dir, **(overrides or {})}
  return config.load(f"configs/quickstart_{name}.py", overrides)


def summarize_pretraining(c, results):
  """Returns the report's numbers, beside those of a constant guess."""
  run_steps = config.count_steps(c, open_train(c).num_examples)
  baseline = evaluate_constant(c)
  return {
    "dataset": c.train.dataset,
    "resolution": c.image_size,
    "images": run_steps * c.batch_size,
    "steps": run_steps,
    "metric_name": "prec@1",
    "metric": results["prec@1"],
    "baseline": baseline["prec@1"],
    "lrap": results["lrap"],
    "baseline_lrap": baseline["lrap"],
    "loss": results["loss"],
    "baseline_loss": baseline["loss"],
  }


def summarize_finetuning(c, finetuned, scratch):
  """Returns the report's numbers of both fine-tunings."""
  train_examples = open_train(c).num_examples
  return {
    "dataset": c.train.dataset,
    "resolution": c.image_size,
    "steps": config.count_steps(c, train_examples),
    "accuracy": finetuned["accuracy"],
    "from_scratch_accuracy": scratch["accuracy"],
    "train_examples": train_examples,
    "test_examples": finetuned["examples"],
  }


def open_train(c):
  """Opens the configuration's training set."""
  return data.get_source(c.train.dataset, c.train.split, c.data_dir)


def evaluate_constant(c) -> dict[str, float]:
  """Evaluates the trivial model that gives every image the class frequencies.

  It goes through the same evaluator as the real one.
  """
  source = data.get_source(
    c.train.dataset, f"train[:{PRIOR_EXAMPLES}]", c.data_dir
  )
  counts = np.zeros(source.num_classes)
  for record in source.read(np.arange(source.num_examples)):
    np.add.at(counts, source.parse_labels(record).numpy(), 1)
  frequency = (counts + 0.5) / (source.num_examples + 1)
  logits = np.log(frequency / (1 - frequency)).astype(np.float32)

  size = (c.image_size, c.image_size)
  constant = models.Model(
    init=lambda key: jnp.asarray(logits),
    apply=lambda params, x, **_: jnp.tile(params, (x.shape[0], 1)),
    image_size=size,
    grid=(1, 1),
    num_layers=0,
  )
  mesh = sharding.make_mesh()
  test = data.get_source(c.train.dataset, c.eval.split, c.data_dir)
  objective = Classification(
    model=constant,
    class_names=test.class_names,
    loss_fn=losses.get_loss(**c.loss),
  )
  evaluate = make_evaluate(
    objective,
    test,
    mesh=mesh,
    batch_size=c.batch_size,
    preprocess=c.eval.preprocess,
  )
  return dict(evaluate(sharding.replicate(mesh, logits)))


def write_test_images(folder, c):
  """Writes some of the test images as files; returns paths and class names."""
  source = data.get_source(c.train.dataset, c.eval.split, c.data_dir)
  folder.mkdir(parents=True, exist_ok=True)
  paths, names = [], []
  for i, record in enumerate(source.read(np.arange(NUM_PREDICTIONS))):
    image, labels = source.parse(record)
    path = folder / f"test_{i}.png"
    path.write_bytes(image.numpy())
    paths.append(str(path))
    names.append(source.class_names[int(labels[0])])
  return paths, names


def draw_figures(folder, source, images):
  """Draws the figures of a checkpoint; `folder` has all of them or none."""
  if folder.exists():
    return  # from a run that was interrupted after it
  with files.atomic_folder(folder) as partial:
    make_figures(str(partial), checkpoints=[source], images=images)


def make_table(result: dict) -> str:
  """Returns the result as lines for people."""
  pre, fine = result["pretrain"], result["finetune"]
  rows = [
    ("", "model", "trivial guess"),
    ("precision@1", f"{pre['metric']:.3f}", f"{pre['baseline']:.3f}"),
    (
      "ranking precision",
      f"{pre['lrap']:.3f}",
      f"{pre['baseline_lrap']:.3f}",
    ),
    ("loss", f"{pre['loss']:.2f}", f"{pre['baseline_loss']:.2f}"),
  ]
  lines = [
    "",
    f"Pre-training: {pre['dataset']} at {pre['resolution']} px, "
    f"{pre['images']:,} images in {pre['steps']:,} steps",
    *(f"  {line}" for line in format_columns(rows)),
    "",
    f"Fine-tuning: {fine['dataset']} at {fine['resolution']} px, "
    f"{fine['train_examples']} labelled images, {fine['steps']} steps; "
    f"accuracy on {fine['test_examples']} held-out images",
    f"  from pre-training  {fine['accuracy']:6.1%}",
    f"  from scratch       {fine['from_scratch_accuracy']:6.1%}",
    "",
    "Predictions",
    *(
      f"  {p['image']}: {p['name']} ({p['probability']:.1%}), "
      f"labelled {p['label']}"
      for p in result["predictions"]
    ),
    "",
    f"{result['seconds']:.0f} seconds in all",
  ]
  return "\n".join(lines)
