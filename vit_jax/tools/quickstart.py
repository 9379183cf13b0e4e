"""The quickstart: the paper's main experiment, in minutes.

Pre-train on many cheap images, fine-tune at twice the resolution on a few real
ones, and compare with training from scratch for the same number of steps.
"""

import logging
import time
from pathlib import Path

import numpy as np

from vit_jax import config, data, files
from vit_jax.evaluation.predict import predict
from vit_jax.tools.figures import make_figures
from vit_jax.tools.text import format_columns
from vit_jax.train import train
from vit_jax.training import losses

log = logging.getLogger(__name__)

REPORT = "report.json"
NUM_PREDICTIONS = 8  # held-out images that are classified at the end
# Training images from which class frequencies are estimated.
PRIOR_EXAMPLES = 4000


def quickstart(folder: Path) -> dict | None:
  """Runs the quickstart in `folder`; writes its report and figures there.

  An interrupted quickstart resumes; a finished one returns its report.

  Returns:
    The report, None if it was interrupted.
  """
  report = folder / REPORT
  found = files.read_json(report) if report.exists() else {"pretrain": {}}
  if "results" in found["pretrain"]:  # reports of older versions are redone
    return found
  begin = time.monotonic()
  data_dir = str(folder / "data")
  for name in ("jft_like", "digits"):
    say(f"Data: {name}")
    data.prepare(name, data_dir)

  say("Pre-training on jft_like")
  pretrain = load("pretrain", data_dir)
  pretrained = train(pretrain, folder / "pretrain")

  say("Fine-tuning on digits, at twice the resolution")
  finetune = load("finetune", data_dir, init_from=str(folder / "pretrain"))
  finetuned = train(finetune, folder / "finetune")

  say("Training on digits from scratch")
  scratch = train(load("finetune", data_dir), folder / "from_scratch")
  if None in (pretrained, finetuned, scratch):
    return None

  say("Predictions for held-out images")
  images, names = write_test_images(folder / "images", finetune)
  predictions = predict(str(folder / "finetune"), images, top=1)
  result = {
    "pretrain": {
      **describe(pretrain),
      "results": pretrained,
      "constant": evaluate_constant(pretrain),
    },
    "finetune": {
      **describe(finetune),
      "results": finetuned,
      "from_scratch": scratch,
    },
    "predictions": [
      {"image": p["image"], "label": name, **p["classes"][0]}
      for p, name in zip(predictions, names, strict=True)
    ],
  }
  say("Attention maps")
  figures, source = folder / "figures", str(folder / "finetune")
  if not figures.exists():  # they may exist after an interruption
    with files.atomic_folder(figures) as partial:
      make_figures(str(partial), checkpoints=[source], images=images)
  result["seconds"] = round(time.monotonic() - begin, 1)
  files.write_json(report, result)
  return result


def say(text: str) -> None:
  log.info("\n== %s", text)


def load(name, data_dir, **overrides):
  """Loads one of the two configurations."""
  given = {"data_dir": data_dir, **overrides}
  return config.load(f"configs/quickstart_{name}.py", given)


def describe(c):
  """Returns the report's entry of a configuration."""
  examples = open_set(c, c.train.split).num_examples
  steps = config.count_steps(c, examples)
  return {
    "dataset": c.train.dataset,
    "resolution": c.image_size,
    "train_examples": examples,
    "steps": steps,
    "images": steps * c.batch_size,
  }


def open_set(c, split):
  """Opens a split of the configuration's data set."""
  return data.get_source(c.train.dataset, split, c.data_dir)


def evaluate_constant(c) -> dict[str, float]:
  """Evaluates a trivial model that predicts the class frequencies.

  The metrics are those of `objectives.Classification`.
  """
  some = read_targets(open_set(c, f"train[:{PRIOR_EXAMPLES}]"))
  targets = read_targets(open_set(c, c.eval.split))
  frequency = (some.sum(0) + 0.5) / (len(some) + 1)
  logits = np.log(frequency / (1 - frequency))
  loss_fn = losses.get_loss(**c.loss)
  guesses = np.tile(logits, (len(targets), 1))
  loss = loss_fn(guesses, targets)  # pyright: ignore[reportArgumentType]
  above = frequency >= frequency[:, None]
  precision = targets @ above.T / above.sum(1)
  lrap = (precision * targets).sum(1) / targets.sum(1)
  return {
    "prec@1": float(targets[:, frequency.argmax()].mean()),
    "lrap": float(lrap.mean()),
    "loss": float(loss.mean()),
  }


def read_targets(source) -> np.ndarray:
  """Returns the labels of all examples as 0 and 1, f64[n k]."""
  targets = np.zeros((source.num_examples, source.num_classes))
  records = source.read(np.arange(source.num_examples))
  for row, record in zip(targets, records, strict=True):
    row[source.parse_labels(record).numpy()] = 1
  return targets


def write_test_images(folder, c):
  """Writes some of the test images as files; returns paths and class names."""
  source = open_set(c, c.eval.split)
  folder.mkdir(parents=True, exist_ok=True)
  paths, names = [], []
  for i, record in enumerate(source.read(np.arange(NUM_PREDICTIONS))):
    image, labels = source.parse(record)
    path = folder / f"test_{i}.png"
    path.write_bytes(image.numpy())
    paths.append(str(path))
    names.append(source.class_names[int(labels[0])])
  return paths, names


def make_table(result: dict) -> str:
  """Returns the result as text."""
  pre, fine = result["pretrain"], result["finetune"]
  texts = [
    (f"{x['prec@1']:.3f}", f"{x['lrap']:.3f}", f"{x['loss']:.2f}")
    for x in (pre["results"], pre["constant"])
  ]
  names = ("precision@1", "ranking precision", "loss")
  rows = [("", "model", "trivial guess"), *zip(names, *texts, strict=True)]
  lines = [
    "",
    f"Pre-training: {pre['dataset']} at {pre['resolution']} px, "
    f"{pre['images']:,} images in {pre['steps']:,} steps",
    *(f"  {line}" for line in format_columns(rows)),
    "",
    f"Fine-tuning: {fine['dataset']} at {fine['resolution']} px, "
    f"{fine['train_examples']} labelled images, {fine['steps']} steps; "
    f"accuracy on {fine['results']['examples']} held-out images",
    f"  from pre-training  {fine['results']['accuracy']:6.1%}",
    f"  from scratch       {fine['from_scratch']['accuracy']:6.1%}",
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
