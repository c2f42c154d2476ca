"""Where a teacher's weights lie: the name of each placement in `teacher.mode`, the keys that are for it alone, and its class.

A new placement is an entry here and a class in `megakd/teachers/`, whose README says how. Nothing else lists them: the modes of a recipe,
what loads the teacher and the rows of `megakd plan` follow from this table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """What is known of a placement before torch is imported.

    where: module and name of the class, a `LiveTeacher` of `megakd/teachers/base.py`. options: keys of `[teacher]` that it reads and
    others do not; with "offload" among them `megakd plan` has rows with and without. int8: whether weights may be in 8 bit.
    """

    where: str
    summary: str
    options: tuple[str, ...] = ()
    int8: bool = True


PLACEMENTS = {
    "replicated": Placement("megakd.teachers.replicated:ReplicatedTeacher", "whole on every rank", ("compile",)),
    "zero3": Placement("megakd.teachers.sharded:ShardedTeacher", "partitioned over the ranks", ("offload", "ds_config")),
}
INT8 = "_int8"
MODES = tuple(name + suffix for name, placement in PLACEMENTS.items() for suffix in (("", INT8) if placement.int8 else ("",)))
INT8_MODES = " or ".join(mode for mode in MODES if mode.endswith(INT8))
