"""Is what `megakd plan` says of traffic true? The real training program on gloo ranks, its collectives counted, against the plan.

Each case trains three steps. Between the ends of the second and the third update `traffic_side.py` counts every collective twice:
DeepSpeed's comms logger has those of the student and of a partitioned teacher, which go through deepspeed.comm; PyTorch's dispatcher has
all of them, the losses' among them, told apart by caller. Messages become bytes that a rank sends as in `runtime.wire`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from megakd.benchmarks.common.children import ended_by_sigterm, running
from megakd.data.shapes import write_world
from megakd.planning import plan as planner
from megakd.planning.modes import STORE, Row
from megakd.recipe import load as recipes
from megakd.runtime.console import plain

TOLERANCE = 0.05
STEP, RUN_SECONDS = 3, 1800
# Of a rank and step, below which nothing is compared: sums of losses and of gradients' norms, agreements of the kernels.
NEGLIGIBLE = 1000
# Times a message as DeepSpeed's logger sizes it, what a rank of W sends: an all-gather's message is a rank's own part.
SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda w: 2 * (w - 1) / w,
    "reduce_scatter": lambda w: (w - 1) / w,
    "all_gather": lambda w: w - 1,
    "sent": lambda w: 1,
    "broadcast": lambda w: (w - 1) / w,
}
LOGGED = {
    "all_gather": ("all_gather_into_tensor", "all_gather"),
    "reduce_scatter": ("reduce_scatter_tensor", "reduce_scatter"),
    "all_reduce": ("all_reduce",),
}
RECIPE = """
name = "traffic"
data = {{ train = "{shards}/train/*.tar", workers = 0 }}
objectives = {{ contrastive = 1.0, similarity = 1.0 }}
optim = {{ steps = 100000, batch = 32, lr = 1e-4 }}
checkpoint = {{ every = 100000 }}
log = {{ every = 1 }}
student = {{ tokenizer = "{shards}/tokenizer", architecture = {student} }}
teacher = {{ tokenizer = "{shards}/tokenizer", pretrained = "random", mode = "{mode}", architecture = {teacher} }}
"""
MODEL = (
    "{{ embed_dim = {0}, vision_cfg = {{ image_size = 32, patch_size = 8, width = {1}, layers = 3, head_width = 32 }}, "
    "text_cfg = {{ context_length = 32, vocab_size = 128, width = {1}, heads = 4, layers = 3 }} }}"
)
# Of the tiny models some weights stay whole on every rank, most are partitioned, and not all can be there at once.
_SMALL = {"stage3_param_persistence_threshold": 10_000}
_FEW = {**_SMALL, "stage3_prefetch_bucket_size": 100_000, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 500_000}
_MICRO = {"train_micro_batch_size_per_gpu": 4}
_BLOCKS = ("kernels.backend=chunked",)
_RING = (*_BLOCKS, "kernels.ring=true")


@dataclass(frozen=True)
class Case:
    """mode: of the teacher. zero: the JSON's zero_optimization; more: its other keys. sets: of the recipe."""

    name: str
    mode: str
    zero: dict[str, Any]
    ranks: int = 2
    more: dict[str, Any] = field(default_factory=dict)
    sets: tuple[str, ...] = ()


CASES = [
    *(
        Case(name, mode, zero, ranks, more, sets)
        for ranks in (2, 4)
        for name, mode, zero, more, sets in (
            ("ZeRO-1", "replicated", {"stage": 1}, {}, ()),
            ("ZeRO-1, 8-bit teacher over the ranks", "zero3_int8", {"stage": 1}, {}, _BLOCKS),
            ("ZeRO-2, teacher over the ranks", "zero3", {"stage": 2}, {}, ()),
            ("ZeRO-2, micro-batches", "replicated_int8", {"stage": 2}, _MICRO, _BLOCKS),
            ("ZeRO-3, both over the ranks", "zero3", {"stage": 3, **_SMALL}, {}, ()),
            ("ZeRO-3, little may live at once", "zero3_int8", {"stage": 3, **_FEW}, {}, _BLOCKS),
            ("ZeRO-3, micro-batches, ring", "replicated", {"stage": 3, **_SMALL}, _MICRO, _RING),
        )
    ),
    Case("no ZeRO", "replicated", {"stage": 0}),
    Case("ZeRO-1, bf16, micro-batches", "replicated", {"stage": 1}, more={"bf16": {"enabled": True}, **_MICRO}),
    Case("ZeRO-3, bf16", "replicated", {"stage": 3, **_SMALL}, more={"bf16": {"enabled": True}}),
]


@dataclass(frozen=True)
class Check:
    """Bytes that one rank sends in a step, by "whose kind": planned, counted at the dispatcher; logged: by kind alone, by DeepSpeed."""

    case: Case
    planned: dict[str, int]
    counted: dict[str, float]
    logged: dict[str, float]

    @property
    def errors(self) -> dict[str, float]:
        """(planned - counted) / counted of each and of the sum; then (planned - logged) / logged of DeepSpeed's, by kind and in sum."""
        return {**_errors(self.planned, self.counted), **{f"logger {name}": error for name, error in self.of_logger().items()}}

    def of_logger(self) -> dict[str, float]:
        planned: dict[str, float] = defaultdict(float)
        for name, size in self.planned.items():
            whose, kind = name.split()
            planned[kind] += size * (whose in ("student", "teacher"))
        return _errors(planned, self.logged)

    @property
    def holds(self) -> bool:
        return all(abs(error) <= TOLERANCE for error in self.errors.values())


def _errors(planned: dict[str, Any], found: dict[str, float]) -> dict[str, float]:
    """Of what is not negligible on either side; infinite where nothing was found."""
    names = [name for name in sorted({*planned, *found}) if max(planned.get(name, 0), found.get(name, 0)) > NEGLIGIBLE]
    pairs = {name: (planned.get(name, 0), found.get(name, 0)) for name in names}
    pairs["sum"] = (sum(planned.values()), sum(found.values()))
    return {name: said / found - 1 if found else float("inf") for name, (said, found) in pairs.items()}


def run(ranks: list[int], file: Path | None = None) -> None:
    """Measure the cases of so many ranks, print planned against counted and logged, and write JSON to `file`.

    Raises ValueError when a run fails, and for a number of ranks that no case has.
    """
    cases = [case for case in CASES if case.ranks in ranks]
    if missing := [number for number in ranks if number not in {case.ranks for case in CASES}]:
        raise ValueError(f"--ranks {missing[0]}: there are cases of 2 and of 4")
    table = Table(title="bytes that a rank sends in a step; error of the plan", title_justify="left")
    for column in ("case", "whose, kind", "planned", "counted", "error"):
        table.add_column(column, justify="left" if column in ("case", "whose, kind") else "right")
    checks = []
    for check in measure(cases):
        checks.append(check)
        for name, *cells in _lines(check):
            table.add_row(f"{check.case.name}, {check.case.ranks} ranks" if name == "sum" else "", name, *cells)
    plain().print(table)
    worst = max((abs(error) for check in checks for error in check.errors.values()), default=0.0)
    verdict = "yes" if all(check.holds for check in checks) else "NO"
    plain().print(f"within {TOLERANCE:.0%}, by kind and in sum, of both instruments: {verdict}; the largest error is {worst:.2%}")
    if file is not None:
        rows = [{**asdict(check), "errors": check.errors, "holds": check.holds} for check in checks]
        file.write_text(json.dumps({"tolerance": TOLERANCE, "checks": rows}, indent=2) + "\n", encoding="utf-8")


def _lines(check: Check) -> Iterator[tuple[str, ...]]:
    found = {**check.counted, "sum": sum(check.counted.values()), "logger sum": sum(check.logged.values())}
    found |= {f"logger {kind}": size for kind, size in check.logged.items()}
    order = sorted(check.errors, key=lambda name: (name != "sum", name.startswith("logger"), name))
    for name in order:
        error = check.errors[name]
        yield name, f"{found.get(name, 0.0) * (1 + error):,.0f}", f"{found.get(name, 0.0):,.0f}", f"{error:+.2%}"


def measure(cases: list[Case]) -> Iterator[Check]:
    """Train each case, one after the other."""
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="megakd-traffic-") as name:
        folder = Path(name)
        shards = write_world(folder / "shapes", train=256, test=8, shard_size=128, zeroshot_per_class=1).out
        for number, case in enumerate(cases):
            yield _check(case, shards, folder / f"case{number}")


def _check(case: Case, shards: Path, folder: Path) -> Check:
    folder.mkdir()
    recipe, config, counts = folder / "recipe.toml", folder / "ds_config.json", folder / "counts.json"
    models = {"student": MODEL.format(64, 128), "teacher": MODEL.format(96, 192)}
    recipe.write_text(RECIPE.format(shards=shards, mode=case.mode, **models), encoding="utf-8")
    logger = {"comms_logger": {"enabled": True, "prof_all": True, "verbose": False, "debug": False}}
    config.write_text(json.dumps({**logger, "zero_optimization": case.zero, **case.more}), encoding="utf-8")
    loaded, name = recipes.load(str(recipe), list(case.sets))
    plan = planner.plan(loaded, name, str(config), planner.Cluster(case.ranks, 1000, kind="cpu"))
    side = str(Path(__file__).parent / "traffic_side.py")
    program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}", side]
    arguments = ["--recipe", str(recipe), "--ds_config", str(config), "--out", str(folder / "run")]
    sets = [word for one in case.sets for word in ("--set", one)]
    command = [sys.executable, *program, str(counts), str(STEP), str(Path(__file__).parents[1] / "train.py"), *arguments, *sets]
    with running(command, folder, "train", 1) as child:
        found = child.wait_for(lambda: json.loads(counts.read_text(encoding="utf-8")) if counts.exists() else None, RUN_SECONDS)
    own = next(row for row in plan.rows if row.mode.name == plan.asked)
    return Check(case, planned(own), *counted(found, case.ranks))


def planned(row: Row) -> dict[str, int]:
    """By "whose kind". A store's teacher sends nothing."""
    assert row.mode.name != STORE
    kinds = {whose: {kind: size for kind, size in asdict(wire).items() if kind in SENT} for whose, wire in row.sent.items()}
    return {f"{whose} {kind}": size for whose, sizes in kinds.items() for kind, size in sizes.items() if size}


def counted(found: dict[str, int], ranks: int) -> tuple[dict[str, float], dict[str, float]]:
    """What a rank sent by what `traffic_side.py` found: by "whose kind" at the dispatcher, and by kind as DeepSpeed's logger has it."""
    logged = {kind: sum(found.get(f"logger {name}", 0) for name in names) * SENT[kind](ranks) for kind, names in LOGGED.items()}
    seen = {name: size for name, size in found.items() if not name.startswith(("calls ", "logger "))}
    sent = {name: size * SENT[name.split()[1]](ranks) for name, size in seen.items()}
    return {name: size for name, size in sent.items() if size}, {kind: size for kind, size in logged.items() if size}
