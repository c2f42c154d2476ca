"""What is logged of a mixture: how many rows of each source were seen, over all ranks, and means of losses over those of one source."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megakd.training.tasks.base import BadSamples, StepPart, Task, TaskBatch

# By a task's items ("samples", "questions"), by source, by loss.
Means = dict[str, dict[str, dict[str, float]]]


class BySource:
    """Of those tasks whose data are a mixture; where none is, everything is empty and costs nothing."""

    def __init__(self, tasks: Sequence[Task], device: torch.device) -> None:
        self._tasks, self._device = tasks, device
        self._mixtures = {task.items: task.mixture for task in tasks if task.mixture is not None}
        self.started_at = 0  # steps of earlier starts

    def outputs(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `sums` needs of the module's outputs, which a backward may then free."""
        return {name: value.detach() for name, value in outputs.items()} if self._mixtures else {}

    def sums(self, parts: Sequence[StepPart], outputs: list[dict[str, Tensor]], batches: Sequence[TaskBatch]) -> Tensor:
        """Of each loss that is a mean over rows: this rank's sum by source, then by source of how many. A collective.

        outputs: those that the losses were computed from, in order.
        """
        found = [torch.zeros(0, device=self._device)]
        for task, part, batch in zip(self._tasks, parts, batches, strict=True):
            if task.mixture is None or part.rows is None:
                continue
            rows = part.rows(outputs)
            source_B = torch.from_numpy(task.mixture.sources_of(batch.index.numpy())).to(self._device)
            for name in task.of_rows:
                sums_2S = torch.zeros(2, len(task.mixture.sources), device=self._device)
                sums_2S.index_add_(1, source_B, torch.stack([rows[name].sum_B.float(), rows[name].count_B.float()]))
                found.append(sums_2S.flatten().nan_to_num())
        return torch.cat(found)

    def means(self, sums: Sequence[float]) -> Means:
        """sums: as `sums` gives them, added up over the ranks; () for a step that is not logged."""
        found: Means = {}
        rest = iter(sums)
        for task in self._tasks if sums else ():
            names = [] if task.mixture is None else [source.name for source in task.mixture.sources]
            for loss in task.of_rows:
                totals, counts = (list(itertools.islice(rest, len(names))) for _ in range(2))
                for name, total, count in zip(names, totals, counts, strict=True):
                    if count:
                        found.setdefault(task.items, {}).setdefault(name, {})[loss] = total / count
        return found

    def row(self, bad: BadSamples, means: Means) -> dict[str, Any]:
        """`sources` of a row of metrics.jsonl; {} without a mixture. bad: since this start.

        seen: rows since the run's first step: those of earlier starts follow from the position alone, later ones are counted.
        """
        found: dict[str, dict[str, Any]] = {}
        for items, mixture in self._mixtures.items():
            for source, before in zip(mixture.sources, mixture.counts(self.started_at), strict=True):
                counter = bad.by_items[items].by_source[source.name]
                seen = before + counter.seen - counter.total
                row = {"seen": seen, "epochs": seen / source.samples, "bad": counter.total}
                found.setdefault(items, {})[source.name] = {**row, "losses": means.get(items, {}).get(source.name, {})}
        return {"sources": found} if found else {}


def flat(means: Means) -> dict[str, float]:
    """For monitors, by ITEMS.SOURCE.LOSS."""
    named = ((f"{items}.{source}", losses) for items, sources in means.items() for source, losses in sources.items())
    return {f"{name}.{loss}": mean for name, losses in named for loss, mean in losses.items()}
