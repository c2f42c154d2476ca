"""A study's file: what is varied, on what it is judged, and what is expected of it.

    megakd study STUDY.toml

Each axis is a table of names; a name stands for overrides of the student's recipe (`set`). The grid is their product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from megakd.recipe import Section, load, texts
from megakd.recipe.section import Positive
from megakd.study.launcher import SHIPPED_DATA

DEFAULT = "default"  # the name of the only value of an axis that the file does not vary
Overrides = dict[str, Any]
AxisName = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[^\s/\\][^\x00-\x1f/\\]*$")]


class Variant(Section):
    """A value of an axis: overrides of the student's recipe, as tables or as dotted keys."""

    set: Overrides = Field(default_factory=dict, description='settings of the student\'s recipe, { "optim.lr" = 1e-3 } or nested tables')


class TaughtBy(Section):
    """A teacher: one that the study trains first, by `recipe`, or a model as it is, by keys of [teacher]."""

    recipe: str | None = Field(None, description="recipe that trains it: a shipped name or a .toml file")
    set: Overrides = Field(default_factory=dict, description="overrides of that recipe")
    taught_by: str | None = Field(None, description="an earlier teacher of the study, from which `recipe` distils it: an assistant")
    teacher: Overrides = Field(default_factory=dict, description="keys of the students' [teacher]: model, mode, patch_grid, ...")

    @model_validator(mode="after")
    def _is_a_model(self) -> TaughtBy:
        named = {"model", "architecture"} & self.teacher.keys()
        if (self.recipe is None) == (not named):
            raise ValueError("give either `recipe`, which trains it, or teacher = { model = ... }, not both and not neither")
        if self.recipe is None and (self.set or self.taught_by):
            raise ValueError("set, taught_by: these are overrides of `recipe`, and there is none; keys of the model belong into `teacher`")
        return self


class Method(Variant):
    """How a student learns. KD objectives of the base recipe are off: a method names all that it uses."""

    teacher: bool = Field(True, description="false: learns without a teacher, so that there is one cell for all of them")


class Part(Section):
    """Some values of each axis; an axis that is left out is taken whole."""

    teachers: list[str] | None = None
    students: list[str] | None = None
    methods: list[str] | None = None
    steps: list[str] | None = None
    data: list[str] | None = None
    seeds: list[int] | None = None


class World(Section):
    """Data that are made before anything else when they are not there: the shapes world, or scikit-learn's digits in the same layout."""

    kind: Literal["shapes", "digits"] = Field("shapes", description="digits: handwriting that is not ours, see data/digits.py")
    folder: str = Field(description="where; shipped recipes, which name data/shapes, read it there")
    train: Positive = Field(20000, description="clean pairs, and as many noisy ones")
    test: Positive = Field(2000, description="pairs to test on")
    seed: int = Field(0, ge=0, lt=2**63)
    caption_noise: float = Field(0.5, ge=0, le=1, description="share of wrong captions in the noisy pairs")
    hard: int = Field(0, ge=0, description="pairs of train_hard, groups of four that differ by one word; shapes only")

    @model_validator(mode="after")
    def _hard_is_of_shapes(self) -> World:
        if self.kind == "digits" and self.hard:
            raise ValueError(f"hard = {self.hard}: pictures of digits have no hard groups; set it to 0")
        return self


class Score(Section):
    """A number of evaluation.json that the study is about; the first is the main one."""

    name: str = Field(min_length=1, max_length=40)
    path: str = Field(description="keys of evaluation.json with '/' between, such as retrieval/test/mean_R@1")
    title: str | None = Field(None, description="for tables and figures; default: the name")
    families: str | None = Field(None, description="path with one * of parts of it, such as reader/test/by_family/*/accuracy")


class Readout(Section):
    """Runs that read each finished tower: recipes with [answers], in order; those without [student] are shared by all towers."""

    chain: list[str] = Field(min_length=1, description='recipes, such as ["smoke_decoder", "vqa_align", "vqa_lora"]')
    blind: str | None = Field(None, description="recipe of the same decoder without a tower, for the questions' own share")
    every_seed: bool = Field(False, description="read a teacher's tower with every seed, as students' towers are; false: with the first")
    set: Overrides = Field(default_factory=dict, description="overrides of all of them")


class Controls(Section):
    """Rows beside the grid, of every study unless they are switched off."""

    random: bool = Field(True, description="each student as it starts, untrained")
    teachers: bool = Field(True, description="each teacher's own tower, by the same scores")


class Hypothesis(Section):
    """What is expected of the numbers, written down before they are there, and when it counts as found."""

    name: str = Field(min_length=1, max_length=80)
    prediction: str = Field(min_length=1, description="in words")
    measure: Literal["order", "order_difference", "gain", "no_difference"] = Field(
        description="order: Spearman over teachers; order_difference: that of `method` less that of `against`; gain: of `method` over "
        "`against`, paired by teacher and seed; no_difference: their difference is no larger than the threshold"
    )
    method: str
    against: str | None = Field(None, description="the method that it is compared with")
    score: str | None = Field(None, description="name of a score; default: the main one")
    threshold: float = Field(description="the measure must exceed it with its whole interval")
    only: Part = Part()
    against_only: Part | None = Field(None, description="where the cells of `against` are; default: as `only`")

    @model_validator(mode="after")
    def _is_compared(self) -> Hypothesis:
        if (self.measure == "order") != (self.against is None and self.against_only is None):
            raise ValueError("against: `order` is of one method, every other measure compares it with another: name that in `against`")
        return self


def _counts(value: Any) -> Any:
    """`steps = [200, 400]` is short for a table of names that set optim.steps."""
    if isinstance(value, list) and all(isinstance(count, int) and not isinstance(count, bool) for count in value):
        if len(set(value)) < len(value):
            raise ValueError(f"{value}: name each number of steps once")
        return {str(count): {"set": {"optim.steps": count}} for count in value}
    return value


class StudySpec(Section):
    """The file as it is written."""

    title: str = Field(min_length=1, max_length=200)
    question: str = Field("Do stronger teachers make better students?", min_length=1)
    asks: Literal["order", "gain"] = Field(
        "order", description="what the report answers: order: do students follow their teachers; gain: is one better than without a teacher"
    )
    base: str = Field(description="recipe of every student: a shipped name or a .toml file")
    set: Overrides = Field(default_factory=dict, description="overrides of the base recipe in every cell")
    evaluation: Overrides = Field(default_factory=dict, description="keys of [evaluation] of students and of teachers that are trained")
    world: World | None = None
    teachers: dict[AxisName, TaughtBy] = Field(default_factory=dict)
    students: dict[AxisName, Variant] = Field(default_factory=lambda: {DEFAULT: Variant()}, min_length=1)
    methods: dict[AxisName, Method] = Field(min_length=1)
    steps: Annotated[dict[AxisName, Variant], BeforeValidator(_counts)] = Field(default_factory=lambda: {DEFAULT: Variant()}, min_length=1)
    data: dict[AxisName, Variant] = Field(default_factory=lambda: {DEFAULT: Variant()}, min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**63 - 1)]] = Field(default_factory=lambda: [0], min_length=1)
    grid: list[Part] = Field(default_factory=lambda: [Part()], min_length=1, description="parts of the product to run; default: all of it")
    small: Part | None = Field(None, description="what `megakd study --small` runs of it: a first answer in minutes")
    exclude: list[Part] = Field(default_factory=list, description="parts to leave out; axes that are not named match everything")
    scores: list[Score] = Field(min_length=1)
    readout: Readout | None = None
    controls: Controls = Controls()
    hypotheses: list[Hypothesis] = Field(default_factory=list)
    store: bool = Field(True, description="embed each teacher once for each data set, and let all its students read that")
    store_views: Positive = Field(1, description="augmented views of each image in it")
    store_type: Literal["bf16", "fp32"] = "bf16"
    retries: int = Field(1, ge=0, le=100, description="further tries of a run that failed for another reason than its settings")

    def scoring(self, *, taught: bool) -> Overrides:
        """`evaluation` as overrides of a recipe. taught: by a teacher; without one there is nothing that diagnostics compare."""
        kinds = {key: value for key, value in self.evaluation.items() if taught or key.partition(".")[0] != "diagnostics"}
        return {"evaluation": kinds} if kinds else {}

    def axis(self, name: str) -> list[Any]:
        """The values of an axis of AXES, in the file's order."""
        tables: dict[str, Mapping[str, Section]] = {"teacher": self.teachers, "student": self.students, "method": self.methods}
        tables |= {"steps": self.steps, "data": self.data}
        return list(self.seeds) if name == "seed" else list(tables[name])

    @model_validator(mode="after")
    def _names_are_known(self) -> StudySpec:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds}: name each seed once")
        if not self.teachers and any(method.teacher for method in self.methods.values()):
            taught = next(name for name, method in self.methods.items() if method.teacher)
            raise ValueError(f"teachers: an axis without values, and methods.{taught} needs a teacher; add one, or set its teacher = false")
        earlier: list[str] = []
        for name, teacher in self.teachers.items():
            if teacher.taught_by is not None and teacher.taught_by not in earlier:
                raise ValueError(
                    f"teachers.{name}.taught_by = {teacher.taught_by!r}: no teacher before it in the file is called so: {earlier}"
                )
            earlier.append(name)
        parts = {f"grid[{number}]": part for number, part in enumerate(self.grid)}
        parts |= {} if self.small is None else {"small": self.small}
        parts |= {f"exclude[{number}]": part for number, part in enumerate(self.exclude)}
        for number, hypothesis in enumerate(self.hypotheses):
            where = f"hypotheses[{number}]"
            parts |= {f"{where}.only": hypothesis.only, f"{where}.against_only": hypothesis.against_only or Part()}
            for key, method in (("method", hypothesis.method), ("against", hypothesis.against)):
                if method is not None and method not in self.methods:
                    raise ValueError(f"{where}.{key} = {method!r}: {texts.did_you_mean(method, self.methods)}methods: {list(self.methods)}")
            known = [score.name for score in self.scores]
            if hypothesis.score is not None and hypothesis.score not in known:
                raise ValueError(f"{where}.score = {hypothesis.score!r}: {texts.did_you_mean(hypothesis.score, known)}scores: {known}")
        for where, part in parts.items():
            for key, values in chosen(part).items():
                if unknown := [value for value in values if value not in self.axis(key)]:
                    near = texts.did_you_mean(unknown[0], map(str, self.axis(key)))
                    raise ValueError(f"{where}: no {key} is called {unknown[0]!r}; {near}there are {self.axis(key)}")
                if not values:
                    raise ValueError(f"{where}: an axis without values ({key}); name some, or take the line out for all of them")
        if len({score.name for score in self.scores}) < len(self.scores):
            raise ValueError(f"scores: two have one name: {[score.name for score in self.scores]}")
        return self


def chosen(part: Part) -> dict[str, list[Any]]:
    """The values that a part names, by axis of AXES."""
    keys = {"teacher": part.teachers, "student": part.students, "method": part.methods, "steps": part.steps, "data": part.data}
    return {axis: values for axis, values in {**keys, "seed": part.seeds}.items() if values is not None}


def as_overrides(settings: Mapping[str, Any]) -> Iterator[str]:
    """`--set` overrides: nested tables and dotted keys alike, values as TOML."""
    for key, value in texts.flat(settings).items():
        yield f"{key}={_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(str(key))} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    escaped = "".join(letter if letter >= " " and letter not in '\\"\x7f' else f"\\u{ord(letter):04x}" for letter in str(value))
    return f'"{escaped}"'


def shipped() -> list[str]:
    """Names of the studies inside the package."""
    return sorted(
        entry.name.removesuffix(".toml") for entry in resources.files("megakd.study.shipped").iterdir() if entry.name.endswith(".toml")
    )


def read(source: str, *, seeds: Sequence[int] | None = None, data: Path | None = None) -> tuple[StudySpec, str]:
    """The study called `source` (a shipped name, or a .toml file), and its name.

    seeds: in the place of the file's. data: the folder of its world in the place of the file's.
    Raises ValueError naming file, key and remedy.
    """
    path = Path(source)
    if path.suffix != ".toml" and "/" not in source:
        if source not in shipped():
            near = texts.did_you_mean(source, shipped(), 0.4)
            raise ValueError(
                f"study {texts.shown(source)}: not a shipped study; {near}shipped: {', '.join(shipped())}; a path ends in .toml"
            )
        text = (resources.files("megakd.study.shipped") / f"{source}.toml").read_text(encoding="utf-8")
    elif not texts.exists(path):
        raise ValueError(f"study {source}: no such file; give a path to a .toml file, or one of the shipped: {', '.join(shipped())}")
    else:
        text = texts.read_text(path, f"study {path}")
    named = f"study {source}"
    settings = texts.parse_toml(text, named)
    world = settings.get("world")
    if data is not None:
        if not isinstance(world, dict):
            raise ValueError(f"{named}: has no [world], so that there is no folder of data to change; give the data's files in its recipes")
        world["folder"] = str(data)
    if seeds is not None:
        settings["seeds"] = list(seeds)
    if isinstance(world, dict) and isinstance(world.get("folder"), str):
        settings = {key: value if key == "world" else _moved(value, world["folder"]) for key, value in settings.items()}
    try:
        return StudySpec.model_validate(settings), path.stem
    except ValidationError as error:
        raise ValueError(f"{named}:\n{load.explain(error, StudySpec)}") from None


def _moved(value: Any, folder: str) -> Any:
    """With each path of the shapes world below the study's own."""
    if isinstance(value, dict):
        return {key: _moved(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, folder) for inner in value]
    if isinstance(value, str) and value.startswith(f"{SHIPPED_DATA}/"):
        return folder + value.removeprefix(SHIPPED_DATA)
    return value
