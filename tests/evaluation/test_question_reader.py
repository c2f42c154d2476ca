"""The closed-vocabulary question reader: in runs and after them, on one rank and two, and what it learns and refuses."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megakd.evaluation import reader_training
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.patch_features import MOST_BYTES, plan_tokens
from megakd.evaluation.reader import score_readers
from megakd.evaluation.reader_training import Lessons, standardise
from megakd.evaluation.report import lines, numbers
from megakd.evaluation.sets import Sets, open_sets, sets_of
from megakd.models import clip
from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.vqa.benchmarks import benchmark
from support import REPOSITORY
from support.questions import source, ten, vqav2, write
from support.runs import events, question_source, ran, run_ranks, train

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (30, 30, 230), "white": (240, 240, 240)}
ALONE = World(0, 1, torch.device("cpu"))


def reader(world: Path, more: str = "") -> str:
    return (
        f"evaluation.reader.test={{ train = {question_source(world, 'train')}, test = {question_source(world, 'test')}, layer = -1, "
        f"width = 32, batch = 32, steps = 12{more} }}"
    )


@pytest.fixture(scope="module")
def run(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sets = ("optim.steps=4", "evaluation.every=2", "evaluation.batch=50", f"evaluation.retrieval.test={world}/test/*.tar")
    return ran(recipe_file, tmp_path_factory.mktemp("read") / "run", *sets, reader(world, ", blind = true"))


def scores_of(run: Path) -> dict[str, Any]:
    scores = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    scores.pop("images_per_second")
    scores.pop("models", None)  # sizes and speeds, of the verb alone
    return scores  # type: ignore[no-any-return]


def test_a_run_is_read_at_its_end_alone_and_evaluate_finds_the_same_on_one_rank_and_two(run: Path) -> None:
    first, last = (event["content"] for event in events(run, "evaluation"))
    assert "reader" not in first
    found = scores_of(run)["reader"]["test"]
    assert last["reader"]["test"] == found
    assert found["questions"] == sum(family["questions"] for family in found["by_family"].values()) == 180
    assert 0 < found["majority"] < 1
    assert 0 < found["blind"] < 1
    assert found["learned"] == 1800
    assert found["image_tokens"] == 16
    written = scores_of(run)
    program = REPOSITORY / "megakd" / "cli" / "__main__.py"
    for ranks in (1, 2):
        (run / "evaluation.json").unlink()
        run_ranks(program, "evaluate", run, ranks=ranks)
        assert scores_of(run) == written


def test_the_scores_are_named_apart_from_a_decoders(run: Path) -> None:
    results = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    text = lines(results)
    assert "question reader test (closed vocabulary of" in text
    assert "no decoder" in text
    assert "vqa" not in text.replace("vqav2", "")
    found = numbers(results)
    assert found["reader/test/accuracy"] == results["reader"]["test"]["accuracy"]
    assert {"reader/test/majority", "reader/test/blind", "reader/test/by_family/colour/accuracy"} <= found.keys()


def test_a_dry_run_says_what_a_reader_will_keep_and_refuses_what_the_tower_does_not_give(recipe_file: Path, world: Path) -> None:
    shown = train(recipe_file, "--dry_run", sets=[reader(world)])
    assert shown.code == 0, shown.err
    assert (
        "question reader test, at the end: 1800 questions to learn, 180 to be scored on; 16 tokens of 32 numbers for each of" in shown.out
    )
    refused = train(recipe_file, "--dry_run", sets=[reader(world), "evaluation.reader.test.layer=7"])
    assert refused.code == 2
    assert "evaluation.reader.test.layer = 7: the vision tower has 1 blocks" in refused.err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "image_tokens",
            "25",
            "test.image_tokens = 25: the vision tower's grid has 4 x 4 patches at evaluation.reader.test.layer; set it to 16",
        ),
        ("image_tokens", "5", "image_tokens = 5: a square number"),
        ("width", "30", "multiple of 4"),
        ("seed", "-1", "evaluation.reader.test.seed"),
        ("batch", "2000", "evaluation.reader.test.batch = 2000, but its train has 1800 questions"),
        ("train.format", "captions", "evaluation.reader.test.train.format = 'captions': a reader chooses among short answers"),
        ("test.format", "llava", "evaluation.reader.test.test.format = 'llava': a reader chooses among short answers"),
        ("train.images", "/nowhere", "evaluation.reader.test.train: images = '/nowhere' is no folder"),
        ("test.annotations", "{world}/questions/train_annotations.json", "evaluation.reader.test.test: "),
    ],
)
def test_what_no_reader_can_learn_is_refused_by_its_key(recipe_file: Path, world: Path, key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        opened(recipes.load(str(recipe_file), [reader(world), f"evaluation.reader.test.{key}={value.format(world=world)}"])[0])


def test_questions_without_images_answers_or_a_choice_are_refused(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(recipe_file, world, tmp_path)
    mine = recipe.evaluation.reader["mine"]
    same = json.loads((tmp_path / "train" / "annotations.json").read_text())
    for annotation in same["annotations"]:
        annotation["multiple_choice_answer"] = "red"
    of_one = mine.train.model_copy(update={"annotations": str(write(tmp_path / "same.json", same))})
    for part, message in (
        ({"train": mine.train.model_copy(update={"images": None})}, "evaluation.reader.mine.train.images: missing"),
        ({"test": mine.test.model_copy(update={"annotations": None})}, "evaluation.reader.mine.test: no question has an answer"),
        ({"train": of_one}, "evaluation.reader.mine.train: all 160 questions have one answer, 'red'"),
    ):
        changed = recipe.evaluation.model_copy(update={"reader": {"mine": mine.model_copy(update=part)}})
        with pytest.raises(ValueError, match=re.escape(message)):
            opened(recipe.model_copy(update={"evaluation": changed}))


def opened(recipe: Recipe) -> Sets:
    """As at the start of a run."""
    assert recipe.student is not None
    sets = open_sets(recipe, ALONE)
    sets.check_tower(clip.on_meta(clip.resolve(recipe.student, "student")).clip)
    return sets


def coloured(folder: Path, images: int) -> dict[str, Any]:
    """Questions about pictures of one colour each, in VQAv2's form."""
    names = list(COLOURS)
    asked, answered = [], []
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        name = names[number % 4]
        shade = tuple(max(0, channel - number % 17) for channel in COLOURS[name])
        Image.new("RGB", (32, 32), shade).save(folder / "images" / f"{number}.png")
        ids = {"image_id": number, "question_id": number}
        asked.append({**ids, "question": "What colour is it?"})
        answered.append({**ids, "question_type": "colour", "multiple_choice_answer": name, "answers": ten(*[name] * 9, "grey")})
    questions = write(folder / "questions.json", {"data_subtype": "val2014", "questions": asked})
    annotations = write(folder / "annotations.json", {"annotations": answered})
    of = {"questions": questions, "annotations": annotations, "images": folder / "images", "image_name": "{image_id}.png"}
    return source("vqav2", **of).model_dump()


def recipe_of(file: Path, world: Path, tmp_path: Path, **more: Any) -> Recipe:
    """The tiny recipe, with a reader of colours."""
    settings = {"layer": -1, "width": 32, "batch": 32, "steps": 60, "lr": 1e-2, "blind": True, **more}
    one = {"train": coloured(tmp_path / "train", 160), "test": coloured(tmp_path / "test", 40), **settings}
    loaded, _ = recipes.load(str(file), [])
    return Recipe.model_validate({**loaded.model_dump(), "evaluation": {"batch": 16, "reader": {"mine": one}}})


def read(recipe: Recipe, drawn: int = 0) -> dict[str, Any]:
    assert recipe.student is not None
    torch.manual_seed(3)
    model = clip.resolve(recipe.student, "student")
    built = clip.build(model, torch.device("cpu"))
    encoder = Encoder(built.clip.eval(), built.preprocess, model.tokenize, torch.device("cpu"), recipe.evaluation.batch)
    sets = opened(recipe)
    torch.manual_seed(drawn)
    return score_readers(sets.reader, encoder, ALONE, StopPoller(ALONE))["mine"]


def test_it_reads_what_the_tower_shows_and_the_same_again_whatever_was_drawn_before(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(recipe_file, world, tmp_path)
    found = read(recipe)
    assert found["accuracy"] == 1.0
    assert found["blind"] == found["majority"] == 0.25
    assert found["answers"] == 4
    assert found["left_out"] == found["unusable"] == 0
    assert read(recipe, drawn=1) == found


def test_an_image_that_cannot_be_read_is_not_learned_and_counts_as_wrong(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(recipe_file, world, tmp_path)
    (tmp_path / "test" / "images" / "5.png").write_bytes(b"no image")
    (tmp_path / "train" / "images" / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"evaluation.reader.mine.test: 1 of 40 questions are unusable"):
        read(recipe)
    found = read(recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_bad_fraction": 0.05})}))
    assert found["accuracy"] == pytest.approx(39 / 40)
    assert (found["unusable"], found["learned"], found["left_out"]) == (1, 159, 1)


def test_answers_beyond_the_vocabulary_are_left_out_and_a_training_that_diverges_is_named(
    recipe_file: Path, world: Path, tmp_path: Path
) -> None:
    found = read(recipe_of(recipe_file, world, tmp_path / "two", answers=2, steps=30))
    assert (found["answers"], found["learned"], found["left_out"]) == (2, 80, 80)
    assert found["accuracy"] <= 0.5
    with pytest.raises(ValueError, match=r"evaluation.reader.mine.lr = 1e\+30: the reader's training has diverged; lower it"):
        read(recipe_of(recipe_file, world, tmp_path / "far", lr=1e30, steps=8))


def test_more_than_is_kept_is_refused_with_the_number_of_tokens_that_fits(recipe_file: Path) -> None:
    """Of ten million images, of which there is no need for one."""
    visual: Any = clip.on_meta(clip.resolve(recipes.load_recipe(recipe_file).student, "student")).clip.visual  # type: ignore[arg-type]
    images = MOST_BYTES // (2 * 32 * 10)
    with pytest.raises(
        ValueError, match=rf"16 tokens of 32 numbers for each of {images} images .* set evaluation.reader.mine.image_tokens to 9 at most"
    ):
        plan_tokens(visual, -1, 0, images, "evaluation.reader.mine")
    assert plan_tokens(visual, -1, 9, images, "evaluation.reader.mine").shape == (9, 32)


def test_an_answer_is_learned_by_its_share_of_the_benchmarks_scores(tmp_path: Path) -> None:
    from megakd.vqa.sets import open_questions
    from support.shards import data, no_barrier

    opened = open_questions(vqav2(tmp_path), "k", data("x.tar"), 0, 1, no_barrier, to_learn=True)
    of_format = benchmark("vqav2")
    lessons = Lessons.of(opened, of_format, [(index, index // 3) for index in range(30)], 3000)  # type: ignore[arg-type]
    assert lessons.answers == sorted(f"answer {number}" for number in range(30))
    assert [len(answers) for answers, _ in lessons.shares] == [1] * 30  # "other" is no question's most frequent answer
    both = {"answer 4": 0, "other": 1, "third": 2}
    answers, shares = reader_training._shares(opened[4], both, of_format)  # type: ignore[misc]
    # 7, 2 and 1 of ten people: scores of 1, .6 and .3
    assert dict(zip(answers, shares, strict=True)) == pytest.approx({0: 1 / 1.9, 1: 0.6 / 1.9, 2: 0.3 / 1.9})
    torch.testing.assert_close(lessons.target([4])[0], torch.eye(30)[lessons.answers.index("answer 4")])


def test_channels_are_standardised_over_the_training_images_alone() -> None:
    tokens = torch.randn(50, 9, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 50, 0.01, 3, 1, 0]) + 7
    kept, train_images = tokens.half(), list(range(0, 50, 2))
    expected = kept.double()
    rows = expected[train_images].flatten(0, 1)
    expected = (expected - rows.mean(dim=0)) / rows.std(dim=0, unbiased=False)
    standardise(kept, train_images)
    torch.testing.assert_close(kept[..., :5].double(), expected[..., :5], rtol=2e-3, atol=2e-3)
    assert not kept[..., 5].any()


def test_the_checksum_of_the_sets_covers_readers_and_is_what_it_was_without_them(recipe_file: Path, world: Path) -> None:
    plain, _ = recipes.load(str(recipe_file), [f"evaluation.retrieval.test={world}/test/*.tar"])
    kinds = {"zero_shot": {}, "retrieval": {"test": f"{world}/test/*.tar"}, "hard_negatives": {}, "vqa": {}, "answer_tokens": 10}
    assert sets_of(plain) == hashlib.sha256(json.dumps(kinds, sort_keys=True).encode()).hexdigest()[:16]
    averaged, _ = recipes.load(
        str(recipe_file), [f"evaluation.retrieval.test={world}/test/*.tar", "optim.ema.decay=0.9", "evaluation.weights=ema"]
    )
    assert sets_of(averaged) == sets_of(plain)  # other weights, the same sets
    read_12, read_13 = (
        sets_of(recipes.load(str(recipe_file), [reader(world), f"evaluation.reader.test.steps={steps}"])[0]) for steps in (12, 13)
    )
    assert read_12 != read_13


def test_a_run_of_answers_alone_has_no_reader(recipe_file: Path, world: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.reader: it scores students that learn from pairs"):
        recipes.load("vqa_lora", [reader(world)])
