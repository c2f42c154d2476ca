"""Recipes: typed, closed, overridable, and every mistake answered with the key, the value and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megakd.recipe import Objectives, Recipe, resume
from megakd.recipe import load as recipes
from megakd.recipe.objectives import declaration, keys
from support.recipe_keys import is_text_or_table, leaves, takes_text
from support.runs import ENSEMBLE, TEACHER


def _load(path: Path | str, *overrides: str) -> Recipe:
    return recipes.load(str(path), overrides)[0]


def _error(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (each test looks at the message)
        _load(path, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", recipes.shipped())
def test_every_shipped_recipe_loads_and_bears_its_file_name(name: str) -> None:
    recipe, origin = recipes.load(name)
    assert recipe.name == name
    assert origin == f"megakd/recipe/shipped/{name}.toml"


def test_every_objective_declares_its_class_and_its_options_are_keys_of_the_recipe() -> None:
    for name in Objectives.model_fields:
        assert declaration(name).where.startswith("megakd.objectives.")
    assert {name for name in Objectives.model_fields if not declaration(name).needs_teacher} == {"contrastive", "sigmoid_contrastive"}
    assert {name for name in Objectives.model_fields if declaration(name).needs_bias} == {"sigmoid_contrastive", "sigmoid_similarity"}
    assert {"objectives.feature", "feature.head", "similarity.temperature"} <= set(keys()) <= dict(leaves(Recipe)).keys()


def test_every_key_says_what_it_means() -> None:
    """README sends people to the recipe's fields for all of them."""
    known = dict(leaves(Recipe))
    assert {"seed", "optim.lr", "decoder.lora.rank", "answers.lr.tower", "answers.train.NAME.format", "ensemble.NAME.mode"} <= known.keys()
    assert {"evaluation.vqa", "evaluation.hard_negatives", "student.architecture", "objectives.feature"} <= known.keys()
    assert [key for key, field in known.items() if not field.description] == []


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optim.stpes=3", "optim.steps"),
        ("optm.steps=3", "optim"),
        ("student.pretraned=x", "student.pretrained"),
        ("teacher.recipee=x", "teacher.recipe"),
        ("seeed=1", "seed"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(recipe_file: Path, override: str, nearest: str) -> None:
    message = _error(recipe_file, override)
    key = override.partition("=")[0]
    assert any(f"{part}: unknown key; did you mean '{nearest}'?" in message for part in (key, key.split(".")[0]))
    assert str(recipe_file) in message
    assert f"--set {override}" in message


BLIND = """
name = "blind"
optim = { steps = 1, batch = 1, lr = 1.0 }
decoder.model = "x"
answers.train.a = { format = "llava", questions = "q" }
"""
SEEING = BLIND + "student.model = 'ViT-S-32'"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (BLIND, ["decoder.adapt=none"], "no projector and no weights to train"),
        (SEEING, ["student.text_padding=longest"], "student.text_padding: is for pairs that objectives learn from"),
        (BLIND, ["answers.weight=0"], "answers: weight = 0 without [answers.teacher]: nothing would be learned"),
        (BLIND, ["answers.lr.tower=1e-3"], "answers.lr.tower: nothing trains the vision tower"),
        (BLIND, ["answers.lr.projector=1e-3"], "answers.lr.projector: without [student]"),
        (SEEING, ["answers.lr.tower=1e-3"], "answers.lr.tower: nothing trains the vision tower"),
        (SEEING, ["decoder.adapt=none", "answers.lr.decoder=1e-3"], "answers.lr.decoder: decoder.adapt = 'none'"),
    ],
)
def test_answers_that_move_nothing_are_refused(text: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    assert message in _error(tmp_path / "r.toml", *overrides)
    _load(tmp_path / "r.toml")


def test_an_unknown_key_without_a_near_one_lists_what_is_known(recipe_file: Path) -> None:
    assert "log.zzz: unknown key; known here: every" in _error(recipe_file, "log.zzz=3")


def test_an_unknown_recipe_name_is_answered_with_the_nearest_and_all_shipped() -> None:
    message = _error("smok")
    assert "recipe 'smok'" in message
    assert "did you mean 'smoke'" in message
    assert "smoke_teacher" in message


def test_a_missing_recipe_file_is_named() -> None:
    message = _error("nowhere/mine.toml")
    assert "nowhere/mine.toml" in message
    assert "no such file" in message


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("optim.steps=many", "optim.steps = 'many'"),
        ("optim.steps=1.5", "optim.steps = 1.5"),
        ("optim.batch=0", "optim.batch = 0"),
        ("optim.lr=fast", "optim.lr = 'fast'"),
        ("optim.lr=-1e-3", "optim.lr = -0.001"),
        ("optim.lr=nan", "optim.lr = nan"),
        ("optim.lr=inf", "optim.lr = inf"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("student.activation_checkpointing=1", "student.activation_checkpointing = 1"),
        ("feature.head=cubic", "feature.head = 'cubic'"),
        ("data.max_bad_fraction=1.1", "data.max_bad_fraction = 1.1"),
        ("similarity.temperature=0", "similarity.temperature = 0"),
        ("similarity.student_scale=inf", "similarity.student_scale = inf"),
        ("student.max_scale=inf", "student.max_scale = inf"),
        ("name=../escape", "name = '../escape'"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_with_its_key(recipe_file: Path, override: str, shown: str) -> None:
    assert f"  {shown}" in _error(recipe_file, override)


def test_override_values_are_toml_and_anything_else_is_a_bare_string(recipe_file: Path) -> None:
    numbers = ("optim.lr=3e-4", "optim.weight_decay=1", "optim.betas=[0.8, 0.9]", "student.activation_checkpointing=true")
    texts = ("data.train=a/{00..03}.tar::b/*.tar", 'data.cache="with space"', "evaluation.retrieval.mine=x/*.tar")
    recipe = _load(recipe_file, *numbers, *texts)
    assert recipe.optim.lr == 3e-4
    assert recipe.optim.weight_decay == 1.0
    assert isinstance(recipe.optim.weight_decay, float)
    assert recipe.optim.betas == (0.8, 0.9)
    assert recipe.data.train == "a/{00..03}.tar::b/*.tar"
    assert recipe.data.cache == "with space"
    assert recipe.student.activation_checkpointing
    assert recipe.evaluation.retrieval == {"mine": "x/*.tar"}
    assert _load(recipe_file, 'data.train=["a.tar", "b.tar"]').data.train == ["a.tar", "b.tar"]


def test_the_last_override_of_a_key_wins(recipe_file: Path) -> None:
    assert _load(recipe_file, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim.lr.deeper=3"])
def test_an_override_that_is_no_key_and_value_is_refused_as_it_was_written(recipe_file: Path, override: str) -> None:
    assert f"--set {override}" in _error(recipe_file, override)


def test_a_missing_required_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text('name = "short"\n[data]\ntrain = "x.tar"\n[student]\nmodel = "ViT-B-32"\n[objectives]\ncontrastive = 1.0\n')
    assert "  optim: missing" in _error(path)
    assert "  optim.steps: missing" in _error(path, "optim.lr=1e-3", "optim.batch=8")


def test_invalid_toml_is_answered_with_the_file_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text('name = "x"\n[data\n')
    message = _error(path)
    assert str(path) in message
    assert "not valid TOML" in message
    assert "line 2" in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["student.model=ViT-B-32"], ["student", "`model`", "`architecture`", "not both"]),
        (["objectives.contrastive=0"], ["objectives", "every weight is 0"]),
        (["optim.warmup=6"], ["optim", "warmup = 6", "steps = 6"]),
        (["views.crop_scale=[0.9, 0.1]"], ["views", "crop_scale"]),
        (["views.crop_ratio=[0.0, 1.0]"], ["views", "crop_ratio"]),
        (["teacher.model=ViT-B-32", "teacher.recipe=smoke_teacher"], ["teacher", "local-dir:", "ViT-B-32"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused(recipe_file: Path, overrides: list[str], words: list[str]) -> None:
    message = _error(recipe_file, *overrides)
    assert all(word in message for word in words), message


def test_two_mistakes_are_answered_together(recipe_file: Path) -> None:
    message = _error(recipe_file, "optim.steps=x", "log.evry=2")
    assert "optim.steps" in message
    assert "log.evry" in message


def test_the_run_json_of_a_run_is_a_recipe_that_says_the_same(recipe_file: Path, tmp_path: Path) -> None:
    recipe = _load(recipe_file, "evaluation.retrieval.mine=x/*.tar", "optim.betas=[0.8, 0.9]", "teacher.model=ViT-B-32")
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    assert _load(tmp_path / "run.json") == recipe


def test_a_json_that_is_no_run_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"stage": 2}')
    assert "no key 'recipe'" in _error(path)
    path.write_text("[1, 2]")
    assert str(path) in _error(path)


def test_the_limit_of_a_comparison_may_change_on_resume_and_what_is_computed_may_not(recipe_file: Path) -> None:
    """The message that stops a run below the limit says to lower it."""
    roles = {"teacher": (*TEACHER, "teacher.mode=zero3_int8"), "ensemble.second": (*TEACHER, *ENSEMBLE, "ensemble.second.mode=zero3_int8")}
    for role, teachers in roles.items():
        old = _load(recipe_file, *teachers)
        assert recipes.differences(old, _load(recipe_file, *teachers, f"{role}.int8_agreement=0.5")) == []
        assert len(recipes.differences(old, _load(recipe_file, *teachers, f"{role}.calibration=64"))) == 1
        assert len(recipes.differences(old, _load(recipe_file, *teachers, f"{role}.int8_product=dequantise"))) == 1


def test_differences_name_what_is_learned_and_not_how_it_is_watched(recipe_file: Path) -> None:
    old = _load(recipe_file)
    watched = ("checkpoint.every=7", "log.every=3", "evaluation.every=1", "data.workers=5", "data.cache=x", "data.max_bad_fraction=0.5")
    assert recipes.differences(old, _load(recipe_file, *watched)) == []
    changed = recipes.differences(old, _load(recipe_file, "optim.lr=1", "teacher.model=ViT-B-32", "objectives.feature=0.5"))
    assert "optim.lr: 0.001 -> 1.0" in changed
    assert "objectives.feature: 0.0 -> 0.5" in changed
    assert "teacher.model: None -> 'ViT-B-32'" in changed


def test_every_key_says_what_a_run_that_goes_on_makes_of_its_change() -> None:
    known = dict(leaves(Recipe))
    tables_of_sections = {key for key in known if any(other.startswith(f"{key}.NAME.") for other in known)}
    of_either = {key for key in tables_of_sections if takes_text(known[key])}  # as are the keys of the sections in them
    assert of_either == {"evaluation.retrieval", "evaluation.hard_negatives"}
    found = [key for key in known if not key.startswith(tuple(f"{table}.NAME." for table in of_either))]
    found = [key for key in found if key not in tables_of_sections - of_either or is_text_or_table(known[key])]
    assert sorted(resume.ON_RESUME) == sorted(key.replace("NAME", "*") for key in found)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("evaluation.vqa.mine.images", "free"),
        ("evaluation.vqa", "free"),
        ("evaluation.zero_shot.new", "free"),
        ("evaluation.retrieval.mine.images", "free"),
        ("ensemble.second.offload", "free"),
        ("ensemble.second.architecture.embed_dim", "refused"),
        ("ensemble", "refused"),
        ("answers.train.mine.images", "told"),
        ("answers.train.mine.format", "refused"),
        ("no.such.key", "refused"),
    ],
)
def test_a_key_with_a_name_of_its_own_is_found_in_the_table(key: str, change: str) -> None:
    assert resume.change(key) == change


# What messages ask people to change, where a run may have checkpoints by then.
@pytest.mark.parametrize(
    "override",
    ["optim.lr=1e-4", "data.max_bad_fraction=0.1", "data.max_pixels=1000", "data.cache=x", "watchdog.limit=3600", "data.train=/b/*.tar"],
)
def test_a_remedy_of_a_message_may_be_followed_in_the_same_folder(recipe_file: Path, override: str) -> None:
    assert recipes.refused(_load(recipe_file), _load(recipe_file, override)) == []


def test_more_steps_are_taken_where_the_schedule_does_not_depend_on_them(recipe_file: Path) -> None:
    assert "optim.steps: 6 -> 9 (with schedule = 'cosine'" in recipes.refused(_load(recipe_file), _load(recipe_file, "optim.steps=9"))[0]
    constant = _load(recipe_file, "optim.schedule=constant")
    longer = _load(recipe_file, "optim.schedule=constant", "optim.steps=9")
    assert recipes.refused(constant, longer) == []
    assert recipes.told(constant, longer)[0].startswith("optim.steps: 6 -> 9: with a constant schedule")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=9223372036854775807", "seed = 9223372036854775807"),
        ("seed=" + "9" * 30, "integers have 64 bits"),
        ("seed=" + "9" * 5000, "an integer of thousands of digits"),
        ("data.workers=100000000000000000000", "data.workers = 100000000000000000000: too large"),
        ("data.workers=5000", "data.workers = 5000"),
        ("optim.steps=1000000001", "optim.steps = 1000000001"),
        ("optim.betas=[0.9, 1.0]", "betas = [0.9, 1.0]"),
        ("views.crop_ratio=[1e-9, 1e9]", "between 0.01 and 100"),
        ("watchdog.limit=1e-3", "limit = 0.001"),
        ("watchdog.limit=1e300", "watchdog.limit = 1e+300"),
        ("name=..", "name = '..'"),
        ("name=" + "x" * 200, "name = 'xxx"),
        ("data.cache=1979-05-27", "data.cache = 1979-05-27: a date"),
        ("data.cache=\x1b[31mred", "control character"),
        ("data.cache=\udcff", "control character"),
        ('evaluation.retrieval.""=x', "empty part"),
        ("optim..lr=1", "empty part"),
        ('optim."lr=1', "not TOML's"),
        ("data.train=" + "[" * 60 + "]" * 60, "nested deeper than 40 levels"),
        ("data.train=" + "[" * 5000 + "]" * 5000, "nested deeper than 40 levels"),
        ("a." * 5000 + "b=1", "more than any setting"),
        ("optim.steps=3 # not four", "optim.steps = '3 # not four'"),
        ("answers.train.mine.fromat=x", "did you mean 'answers.train.mine.format'"),
    ],
)
def test_an_override_that_no_run_can_mean_is_one_message(recipe_file: Path, override: str, words: str) -> None:
    message = _error(recipe_file, override)
    assert words in message
    assert len(message) < 3000


def test_a_name_with_dots_stands_in_quotes(recipe_file: Path) -> None:
    assert _load(recipe_file, 'evaluation.retrieval."my.set"=x/*.tar').evaluation.retrieval == {"my.set": "x/*.tar"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'name = "\xff"', "byte 0xff in line 1 is not UTF-8"),
        (b"x = " + b"[" * 5000 + b"]" * 5000, "nested deeper than 40 levels"),
        (b"x = " + b"9" * 5000, "an integer of thousands of digits"),
        (b"# " + b"x" * 17_000_000, "larger than 16 MB"),
    ],
)
def test_a_recipe_that_no_parser_should_take_is_one_message(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    assert words in _error(tmp_path / "r.toml")


def test_a_byte_order_mark_is_no_error(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbf" + recipe_file.read_bytes())
    assert _load(tmp_path / "r.toml") == _load(recipe_file)


def test_a_recipe_that_is_a_folder_or_has_an_impossible_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.toml").mkdir()
    assert "this is a folder" in _error(tmp_path / "r.toml")
    assert "no such file" in _error("x" * 300 + ".toml")
    (tmp_path / "run.json").write_text('{"recipe": [1]}')
    assert "recipe = [1]: a table of settings is needed" in _error(tmp_path / "run.json")
