"""From results of samples to figures with intervals.

Axes: P examples, G temperatures.
"""

from collections import defaultdict
from typing import Any

import numpy as np

from mtp_jax.eval.collect import Line
from mtp_jax.eval.intervals import best_interval, mean_interval, pass_at_k
from mtp_jax.eval.task_data import TaskData, repeats
from mtp_jax.eval.tasks.kinds import AnswerTask, CodeTask

Items = list[dict[str, Any]]


def summarize(data: TaskData, lines: list[Line]) -> tuple[dict[str, Any], Items]:
    """Figures, and the results of each example.

    Args:
      data: the task.
      lines: results, in JSON's types; those of written texts name the example, the
        number of the sample and its temperature.

    Returns:
      `metrics`, with `value`, `low` and `high` of its 95% interval by name, and
      `items`: for each example its id, what it counts in each metric, its weight
      where that is not 1, and all of its results.
    """
    items: Items = [
        {"item": i, "id": name, "scores": {}, "results": []}
        for i, name in enumerate(data.numbers)
    ]
    for line in lines:
        items[line["item"]]["results"].append(
            {k: v for k, v in line.items() if k != "item"}
        )
    if isinstance(data.task, AnswerTask | CodeTask):
        return _of_samples(data, items), items
    for item in items:
        [result] = item["results"]
        item["scores"] = result.pop("scores")
        if "weight" in result:
            item["weight"] = result.pop("weight")
    names = items[0]["scores"]
    return {name: _interval(items, name) for name in names}, items


def _interval(items: Items, name: str) -> dict[str, float]:
    values = np.array([item["scores"][name] for item in items])
    weights = np.array([item.get("weight", 1.0) for item in items])
    return _named(mean_interval(values, weights))


def _named(interval: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), interval, strict=True))


def _of_samples(data: TaskData, items: Items) -> dict[str, Any]:
    """Figures of written texts, by temperature; fills in the scores of the items.

    With several temperatures there is also the best of them for each metric, which was
    chosen on the same examples (`temperature` tells it): an upper bound for a
    temperature that is fixed beforehand.
    """
    temperatures = data.settings.temperatures or (0.0,)
    metrics: dict[str, Any] = {}
    for name, values_GP in _values(data, items).items():
        for temperature, values_P in zip(temperatures, values_GP, strict=True):
            several = len(temperatures) > 1
            full = f"{name} at temperature {temperature:g}" if several else name
            metrics[full] = _named(mean_interval(values_P))
            _keep(items, full, values_P)
        if len(temperatures) > 1:
            best = int(np.argmax(values_GP.mean(axis=1)))
            full = f"{name} at the best temperature"
            metrics[full] = _named(best_interval(values_GP))
            metrics[full]["temperature"] = temperatures[best]
            _keep(items, full, values_GP[best])
    return metrics


def _keep(items: Items, name: str, values_P: np.ndarray) -> None:
    for item, value in zip(items, values_P, strict=True):
        item["scores"][name] = float(value)


def _values(data: TaskData, items: Items) -> dict[str, np.ndarray]:
    """Each metric of each example at each temperature, float64 [G, P]."""
    temperatures = data.settings.temperatures or (0.0,)
    found: dict[str, list[list[float]]] = defaultdict(list)
    for temperature in temperatures:
        rows: dict[str, list[float]] = defaultdict(list)
        for item in items:
            of_item = [
                r["scores"] for r in item["results"] if r["temperature"] == temperature
            ]
            for name, value in _of_item(data, of_item).items():
                rows[name].append(value)
        for name, values in rows.items():
            found[name].append(values)
    return {name: np.array(rows) for name, rows in found.items()}


def _of_item(data: TaskData, scores: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of an example at a temperature: means of its samples, and pass@k."""
    values: dict[str, float] = {}
    task = data.task
    if isinstance(task, AnswerTask):
        values = {
            name: float(np.mean([one[name] for one in scores])) for name in scores[0]
        }
    if repeats(task) and (isinstance(task, CodeTask) or len(scores) > 1):
        main = task.main if isinstance(task, AnswerTask) else "passed"
        passed = sum(one[main] == 1.0 for one in scores)
        for k in data.settings.k or ():
            values[f"pass@{k}"] = pass_at_k(len(scores), passed, k)
    return values
