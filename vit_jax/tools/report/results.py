"""One run's test set: right by class, mixed up, most confidently wrong."""

import collections

from vit_jax.tools.report.details import Details
from vit_jax.tools.report.tags import (
  Raw,
  bar,
  fold,
  image,
  join,
  percent,
  table,
  tag,
)
from vit_jax.tools.runs import Run

# Up to so many classes everything is shown at once.
_FEW = 20
# Of more classes: the rows that are shown, and those that can be unfolded.
_WORST = 20
_FOLDED = 2000
# An image's labels that are shown at once.
_FEW_LABELS = 3


def tell(run: Run, found: Details | str) -> Raw:
  """Returns a run's section: what was found, or why there is nothing."""
  if isinstance(found, str):
    return tag("p", found)
  parts = [_tell_total(run, found), tag("h3", "By class")]
  if found.multilabel:
    parts.append(_tell_given(found))
    parts.append(
      tag(
        "p",
        "There is no confusion matrix: these images may have several labels, "
        "and a wrong class is not given in place of a certain one.",
      )
    )
  else:
    parts.append(_tell_classes(found))
    parts.append(tag("h3", "What is taken for what"))
    parts.append(_tell_confusion(found))
  parts += [tag("h3", "The most confident mistakes"), _tell_mistakes(found)]
  return join(parts)


def _tell_total(run, found):
  """Compares the counts with what the run itself had measured."""
  tally = found.tally
  share = tally.correct / max(tally.labelled, 1)
  images = f"{tally.labelled:,} images"
  if tally.labelled < tally.examples:
    images += f" with a label, of {tally.examples:,}"
  name = "precision at 1" if found.multilabel else "accuracy"
  metric = "prec@1" if found.multilabel else "accuracy"
  measured = run.evaluations.get(found.step, {}).get(metric)
  if measured is None:
    beside = "The run did not evaluate this step."
  elif measured == share:
    beside = "The run itself measured the same."
  else:
    beside = (
      f"The run itself measured {percent(measured)}: on other devices a close "
      "decision may fall the other way, or the data have changed."
    )
  return tag(
    "p",
    f"{found.dataset}, {found.split}, with the weights of ",
    tag("code", found.checkpoint),
    f": {tally.correct:,} of {images} right, ",
    tag("strong", f"{name} {percent(share)}"),
    f". {beside}",
  )


def _count_by(pairs, place):
  counts = collections.Counter()
  for pair, n in pairs.items():
    counts[pair[place]] += n
  return counts


def _tell_classes(found):
  pairs = found.tally.pairs
  images = _count_by(pairs, 0)
  wrong = collections.defaultdict(list)
  for (label, given), n in sorted(pairs.items()):
    if label != given:
      wrong[label].append((-n, given))
  rows, absent = [], 0
  for label, name in enumerate(found.class_names):
    count = images[label]
    if not count:
      absent += 1
      continue
    right = pairs[label, label]
    taken_for = "\u2013"
    if wrong[label]:
      n, given = min(wrong[label])
      taken_for = f"{found.class_names[given]} ({-n:,})"
    share = right / count
    cells = (_of(right, count), bar(share, percent(share)), taken_for)
    rows.append((share, count, (name, *cells)))
  head = ("Class", "Right", "Accuracy", "Most often taken for")
  why = "without an image in the test set"
  return _show_rows(found, rows, head, absent, why)


def _of(right, count):
  return f"{right:,} of {count:,}".replace(" ", "\u00a0")


def _tell_given(found):
  pairs = found.tally.pairs
  given = _count_by(pairs, 1)
  rows, absent = [], 0
  for label, name in enumerate(found.class_names):
    count = given[label]
    if not count:
      absent += 1
      continue
    right = pairs[label, label]
    share = right / count
    cells = (
      _of(right, count),
      bar(share, percent(share)),
    )
    rows.append((share, count, (name, *cells)))
  head = ("Top class", "Among the labels", "Share")
  return _show_rows(found, rows, head, absent, "never the top class")


def _show_rows(found, rows, head, absent, why):
  """Returns a table of all classes, of many the worst ones first."""
  parts = []
  if len(rows) <= _FEW:
    parts.append(table("Each class", head, [row for *_, row in rows]))
  else:
    # Of equal ones those with more images say more.
    rows.sort(key=lambda row: (row[0], -row[1]))
    worst = [row for *_, row in rows[:_WORST]]
    parts.append(table(f"The lowest {_WORST} of {len(rows):,}", head, worst))
    rest = [row for *_, row in rows[_WORST:_FOLDED]]
    summary = f"{len(rest):,} more classes"
    if rest:
      parts.append(fold(summary, table(summary, head, rest)))
  if absent:
    total = len(found.class_names)
    parts.append(tag("p", f"Left out: {absent:,} of {total:,} classes, {why}."))
  return join(parts)


def _tell_confusion(found):
  if len(found.class_names) <= _FEW:
    return _draw_matrix(found)
  images = _count_by(found.tally.pairs, 0)
  mixed = sorted(
    (-n, pair) for pair, n in found.tally.pairs.items() if pair[0] != pair[1]
  )
  rows = [
    (
      found.class_names[label],
      found.class_names[given],
      f"{-n:,}",
      bar(-n / images[label], percent(-n / images[label])),
    )
    for n, (label, given) in mixed[:_WORST]
  ]
  if not rows:
    return tag("p", "Nothing: every image got its class.")
  head = ("Class", "Taken for", "Images", "Of the class")
  return table("The pairs that are mixed up most often", head, rows)


def _draw_matrix(found):
  """Returns a row for each class, a column for each class given."""
  names, pairs = found.class_names, found.tally.pairs
  images = _count_by(pairs, 0)

  def draw(label, given):
    n = pairs[label, given]
    kind = "right" if label == given else "wrong" if n else "none"
    share = n / max(images[label], 1)
    return tag("td", f"{n:,}", class_=kind, style=f"--share:{share:.3f}")

  rows = [
    (name, *(draw(label, given) for given in range(len(names))))
    for label, name in enumerate(names)
  ]
  long = max(map(len, names)) > 3
  head = ("is", *(tag("span", name, class_="tall" * long) for name in names))
  caption = "Rows: what the images are. Columns: what they are taken for."
  return table(caption, head, rows, class_="matrix")


def _tell_mistakes(found):
  if not found.mistakes:
    return tag("p", "There are none.")
  told = (
    "The wrong classes that the model was surest of, as it got the pictures."
  )
  if found.attends:
    told += (
      " Beside each the same picture, dark where the model did not look: its "
      "attention, rolled out over all layers."
    )
  else:
    told += " The model is a ResNet and has no attention to show."
  figures = [_draw_mistake(found, mistake) for mistake in found.mistakes]
  return join([tag("p", told), tag("div", *figures, class_="mistakes")])


def _draw_mistake(found, mistake):
  about = mistake.found
  names = [found.class_names[label] for label in about.labels]
  what = (
    ", ".join(names) if len(names) <= _FEW_LABELS else (f"{len(names)} labels")
  )
  pictures = [image(mistake.picture, f"Test image {about.index}: {what}")]
  if mistake.attention:
    pictures.append(
      image(mistake.attention, "The same, dark where the model did not look")
    )
  small = max(mistake.picture.size) < 100
  caption = tag(
    "figcaption",
    "Taken for ",
    tag("strong", found.class_names[about.given]),
    f" with {_show_probability(about.probability)}",
    _tell_labels(names, _show_probability(about.label_probability)),
    tag("small", mistake.name),
  )
  kind = "pictures small" if small else "pictures"
  return tag("figure", tag("div", *pictures, class_=kind), caption)


def _tell_labels(names, probability):
  """Returns what an image is; a long list of labels is folded."""
  if len(names) == 1:
    what = tag("strong", names[0])
    return tag("div", "Is ", what, f", which got {probability}")
  if len(names) <= _FEW_LABELS:
    what = tag("strong", ", ".join(names))
    return tag("div", "Is ", what, f", the likeliest with {probability}")
  summary = f"Has {len(names)} labels, the likeliest with {probability}"
  return fold(summary, ", ".join(names))


def _show_probability(x):
  return f"{x:.1%}".replace("%", "\u00a0%")
