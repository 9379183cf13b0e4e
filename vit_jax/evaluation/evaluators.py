"""The evaluations of a run, as its configuration lists them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vit_jax import data, models
from vit_jax.config import list_evals
from vit_jax.errors import check_choice
from vit_jax.evaluation import fewshot
from vit_jax.evaluation.sums import add_up, make_sums
from vit_jax.training.lora import adapt
from vit_jax.training.objectives import Classification, Objective


class Evaluator(NamedTuple):
  """One evaluation of a run."""

  name: str  # "eval", or that of an entry of config.evals
  every: int  # steps between evaluations; 0: at the end only
  # To choose the best checkpoint by, higher is better; the first by default.
  metrics: tuple[str, ...]
  run: Callable  # params -> iterator of (metric, value)

  def find(self, results: dict[str, float]) -> dict[str, float]:
    """Returns this evaluation's entries of {NAME/METRIC: value}."""
    mine = f"{self.name}/"
    return {key: x for key, x in results.items() if key.startswith(mine)}


def make_evaluators(
  config,
  sources: Mapping[str, Sequence[data.Source]],
  objective: Objective,
  **where,
) -> list[Evaluator]:
  """Returns the evaluators of a run, that of `config.eval` first.

  Args:
    config, objective: the run's.
    sources: {evaluation: its data}, as `inputs.Inputs` has them.
    **where: `mesh` and `before_batch` of `make_sums`.

  Raises:
    UserError: a batch size, preprocessing or data that cannot be evaluated.
  """
  made = []
  for e in list_evals(config):
    where |= {"batch_size": e.batch_size, "preprocess": e.preprocess}
    make = OTHERS.get(e.type, _make_own)
    metrics, run = make(config, e, sources[e.name], objective, **where)
    made.append(Evaluator(e.name, e.every, metrics, run))
  return made


def _make_own(config, e, sources, objective, **where):
  (test,) = sources
  run = make_evaluate(objective, test, **where)
  if isinstance(objective, Classification):
    return ("prec@1", "lrap") if test.multilabel else ("accuracy",), run
  return ("r2" if objective.target == "pixels" else "accuracy",), run


def _make_fewshot(config, e, sources, objective, **where):
  # Without a head, which the features do not need; parameters may have one.
  options = {"image_size": config.image_size, **config.model}
  model = adapt(
    models.create(num_classes=0, **options), **config.get("lora", {})
  )
  train, test = sources
  metrics = tuple(f"{count}shot" for count in e.shots)
  return metrics, fewshot.make_evaluate(model, train, test, e.shots, **where)


# Other types of evaluations than the objective's own -> the function that makes
# the `metrics` and `run` of their `Evaluator`.
OTHERS = {"fewshot": _make_fewshot}


def check_types(config) -> None:
  """Raises a UserError for an evaluation of an unknown type."""
  for e in list_evals(config):
    kinds = (config.objective, *OTHERS)
    check_choice(f"config.{e.key}.type", e.type, kinds)


def make_evaluate(
  objective: Objective, source: data.Source, **where
) -> Callable:
  """Returns params -> iterator of (metric, value) of an objective's test set.

  `where` has the other arguments of `make_sums`.
  """
  where |= {"model": objective.model, "source": source}
  sums = make_sums(objective.eval_step, **where)
  several = source.multilabel
  return lambda params: objective.summarize(add_up(sums(params)), several)


def find_best(config, evaluators: Sequence[Evaluator]) -> str | None:
  """Returns the EVALUATION/METRIC that decides which checkpoint is best.

  None for a run that evaluates nothing, or nothing but `config.evals`.

  Raises:
    UserError: `config.best_metric` is none of theirs.
  """
  choices = [f"{e.name}/{metric}" for e in evaluators for metric in e.metrics]
  best = config.get("best_metric")
  if best:
    check_choice("config.best_metric", best, choices)
  return best or next((x for x in choices if x.startswith("eval/")), None)
