"""What a configuration makes of the data: repeats, in each kind of order."""

import numpy as np
import pytest

from vit_jax import config as configuration
from vit_jax import data
from vit_jax.training import inputs, objectives


@pytest.mark.parametrize("shuffle", ["all", "blocks"])
def test_repeats_of_a_configuration(shuffle, tmp_path):
  data.prepare("digits", str(tmp_path))
  keys = {"data_dir": str(tmp_path), "train.dataset": "digits"}
  keys |= {"eval.split": "", "image_size": "8", "model.variant": "ViT-N_8"}
  keys |= {"train.preprocess": "resize(size)", "train.shuffle": shuffle}
  keys |= {"train.repeats": "3", "batch_size": "24"}
  config = configuration.load("common", keys)
  configuration.check_ranges(config)
  opened = inputs.open_inputs(config)
  order = inputs.choose_shuffle(config, opened, None)
  assert order.streams == (8 if shuffle == "blocks" else 1)
  [batch] = inputs.read_rows(config, opened, order, np.arange(24), 5, 1)
  views = batch["image"].reshape(8, 3, -1)
  assert (views == views[:, :1]).all()
  assert len(np.unique(views[:, 0], axis=0)) == 8
  objective = objectives.create(config, opened.first.class_names)
  assert objective.repeats == 3
