"""Sets of questions: images found before anything starts, read from folders and from shards, and several sets as one."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import pytest

from megakd.data.bad_samples import BadSample
from megakd.data.shapes import write_world
from megakd.vqa.images import is_shards
from megakd.vqa.sets import CaptionSet, Mixture, QuestionSet, QuestionWithImage, question_order
from support import questions as files
from support.questions import mixture, opened, source, talk, write, write_images
from support.shards import jpeg, write_set, write_tar


def images_of(questions: QuestionSet | CaptionSet | Mixture) -> list[bytes | None]:
    read = questions.read(range(len(questions)), True)
    assert all(isinstance(one, QuestionWithImage) for one in read), read
    return [one.image for one in read if isinstance(one, QuestionWithImage)]


@pytest.mark.parametrize("format", files.WRITERS)
def test_questions_of_every_format_are_read_with_their_images_from_a_folder(tmp_path: Path, format: str) -> None:
    given = files.WRITERS[format](tmp_path)
    questions = opened(given)
    for index, image in enumerate(images_of(questions)):
        name = questions[index].image
        assert image == (None if name is None else (Path(str(given.images)) / name).read_bytes())


def test_images_lie_in_shards_under_the_key_without_extension(tmp_path: Path) -> None:
    names = [f"COCO_val2014_{40 + number:012d}" for number in range(files.IMAGES)]
    members = [(f"{name}.{ext}", jpeg(n) if ext == "jpg" else b"") for n, name in enumerate(names) for ext in ("jpg", "json")]
    write_tar(tmp_path / "0.tar", members[4:])
    write_tar(tmp_path / "1.tar", members[:4])
    questions = opened(files.vqav2(tmp_path, images=tmp_path / "*.tar"))
    assert images_of(questions) == [jpeg(number // 3 % files.IMAGES) for number in range(30)]
    assert images_of(pickle.loads(pickle.dumps(questions))) == images_of(questions)  # noqa: S301
    write_tar(tmp_path / "2.tar", members[:2])
    with pytest.raises(ValueError, match=r"the key of 'COCO_val2014_000000000040\.jpg' is in the shards 2 times"):
        opened(files.vqav2(tmp_path, images=tmp_path / "*.tar"))


def test_the_shapes_worlds_questions_find_their_pictures(tmp_path: Path) -> None:
    world = write_world(tmp_path / "w", train=30, test=8, shard_size=20, zeroshot_per_class=1).out
    for split in ("train", "test", "held_out"):
        files_of = {name: world / f"questions/{split}_{name}.json" for name in ("questions", "annotations")}
        questions = opened(source("vqav2", **files_of, images=world / split / "*.tar", image_name="{image_id:09d}"))
        assert len(images_of(questions)) == len(questions) >= 24
        assert questions[0].family in ("colour", "shape", "size", "position", "count", "existence", "relation")
        assert ("held_out_pairs" in questions[0].meta) == (split == "held_out")
    text = opened(source("llava", questions=world / "questions/train_text.json"))
    assert images_of(text) == [None] * len(text)
    assert text[0].text == ""
    assert len(text[1].turns) in (3, 4)


def test_missing_images_are_counted_and_named_before_anything_starts(tmp_path: Path) -> None:
    given = files.vqav2(tmp_path)
    for number in (40, 42, 43, 44):
        (tmp_path / "images" / f"COCO_val2014_{number:012d}.jpg").unlink()
    said = r"^answers\.train\.mine: images = '.*/images' lacks 4 images .*\(COCO_val2014_000000000040\.jpg, .*, \.\.\.\): .*image_name"
    with pytest.raises(ValueError, match=said):
        opened(given)
    write_set(tmp_path, 6, 1)
    with pytest.raises(ValueError, match=r"images = '.*/00000\.tar' lacks 5 images"):
        opened(files.vqav2(tmp_path, images=tmp_path / "00000.tar"))
    with pytest.raises(ValueError, match=r"images = '.*gone' is no folder"):
        opened(files.vqav2(tmp_path, images=tmp_path / "gone"))


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg"])
def test_a_name_cannot_leave_the_folder_of_images(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, "secret.jpg", "images/a.jpg")
    file = write(tmp_path / "l.json", [{"image": name, "conversations": talk("a", "b")}])
    with pytest.raises(ValueError, match="would be read from outside"):
        opened(source("llava", questions=file, images=tmp_path / "images"))


def test_without_images_questions_are_text_alone_and_keep_the_name(tmp_path: Path) -> None:
    questions = opened(source("vizwiz", questions=files.vizwiz(tmp_path).questions))
    assert images_of(questions) == [None, None]
    assert questions[0].image == "VizWiz_val_00000000.jpg"


def test_an_image_that_vanishes_is_a_bad_sample_of_its_questions_alone(tmp_path: Path) -> None:
    questions = opened(files.vqav2(tmp_path))
    (tmp_path / "images" / "COCO_val2014_000000000041.jpg").unlink()
    read = questions.read([2, 3, 4, 6], True)
    assert [isinstance(one, BadSample) for one in read] == [False, True, True, False]
    assert isinstance(read[1], BadSample)
    assert read[1].reason == "missing_image"
    assert str(read[1]).startswith("answers.train.mine: question 1003: ")
    assert all(isinstance(one, QuestionWithImage) and one.image is None for one in questions.read([2, 3], False))


def test_captions_are_questions_without_words(tmp_path: Path) -> None:
    pattern = write_set(tmp_path, 7, 2)
    questions = opened(source("captions", images=pattern))
    assert isinstance(questions, CaptionSet)
    assert (questions[3].text, questions[3].answers, questions[3].answer) == ("", ("caption 3",), "caption 3")
    assert images_of(questions) == [jpeg(number) for number in range(7)]
    with pytest.raises(ValueError, match=r"questions = 'q\.json': format = 'captions' reads the members of shards"):
        opened(source("captions", images=pattern, questions="q.json"))
    with pytest.raises(ValueError, match="needs image-text shards"):
        opened(source("captions", images=tmp_path))


def test_a_mixture_is_its_sets_one_after_the_other(tmp_path: Path) -> None:
    sources = {"vqa": files.vqav2(tmp_path / "v"), "pope": files.pope(tmp_path / "p"), "talk": files.llava(tmp_path / "l")}
    sources["pairs"] = source("captions", images=write_set(tmp_path / "c", 4, 1))
    several = mixture(**sources)
    alone = [opened(one) for one in sources.values()]
    assert len(several) == 30 + 2 + 3 + 4
    expected = [questions[index] for questions in alone for index in range(len(questions))]
    assert [several[index] for index in range(len(several))] == expected
    mixed = several.read([38, 0, 30, 33, 1, 35], True)
    assert [one.question for one in mixed if isinstance(one, QuestionWithImage)] == [expected[index] for index in (38, 0, 30, 33, 1, 35)]
    with pytest.raises(IndexError, match="question 39 of 39"):
        several[39]


def test_a_changed_answer_changes_the_signature(tmp_path: Path) -> None:
    given = files.vqav2(tmp_path)
    before = opened(given).signature
    assert opened(given).signature == before
    annotations = json.loads(Path(str(given.annotations)).read_text())
    annotations["annotations"][3]["multiple_choice_answer"] = "other"
    write(Path(str(given.annotations)), annotations)
    assert opened(given).signature != before


def test_a_set_without_answers_is_for_evaluation_alone(tmp_path: Path) -> None:
    test = source("vqav2", questions=files.vqav2(tmp_path).questions)
    assert len(opened(test)) == 30
    with pytest.raises(ValueError, match=r"answers\.train\.vqa: 30 of 30 questions have no answer to learn .*: name the annotations"):
        mixture(vqa=test)


def test_conversations_without_any_answer_are_left_out_of_training_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = [{"id": f"c{number}", "conversations": talk("what?", "" if number in (1, 3) else "red")} for number in range(6)]
    given = source("llava", questions=write(tmp_path / "l.json", entries))
    learned = mixture(talk=given)
    assert [learned[index].question_id for index in range(len(learned))] == ["c0", "c2", "c4", "c5"]
    assert "answers.train.talk: 2 of 6 questions have no answer to learn (c1, c3): they are left out" in caplog.text
    assert len(opened(given)) == 6
    silent = source("llava", questions=write(tmp_path / "s.json", entries[1::2][:2]))
    with pytest.raises(ValueError, match=r"^answers\.train\.talk: 2 of 2 questions have no answer to learn \(c1, c3\): gpt says nothing"):
        mixture(talk=silent)


def test_a_benchmarks_questions_without_an_answer_are_named(tmp_path: Path) -> None:
    entries = [{"image": f"{number}.jpg", "question": "?", "answers": [] if number == 2 else files.ten("red")} for number in range(4)]
    given = source("vizwiz", questions=write(tmp_path / "v.json", entries))
    with pytest.raises(ValueError, match=r"1 of 4 questions have no answer to learn \(2\.jpg\): take another split if this is a test set"):
        mixture(vqa=given)


@pytest.mark.parametrize("folder", ["u.tarski/images", "set.tar.d", "set.tar", "s/all.tar/x"])
def test_a_folder_of_images_may_have_any_name(tmp_path: Path, folder: str) -> None:
    images = write_images(tmp_path / folder, "a.jpg")
    file = write(tmp_path / "v.json", [{"image": "a.jpg", "question": "?"}])
    assert images_of(opened(source("vizwiz", questions=file, images=images))) == [(images / "a.jpg").read_bytes()]


@pytest.mark.parametrize(
    ("images", "shards"),
    [
        ("/data/{00000..00009}.tar", True),
        ("/data/{a.tar,b.tar}", True),
        ("/data/*.tar::/more/0.tar", True),
        ("https://there/0.tar?signature=x", True),
        ("/data/x.tarski/images", False),
        ("/data/x.tar/images", False),
        ("/data/images", False),
    ],
)
def test_shards_are_told_by_the_end_of_their_name(images: str, shards: bool) -> None:
    assert is_shards(images) is shards


def test_fewer_questions_than_a_batch_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"answers\.batch = 31, but answers\.train has 30 questions"):
        question_order(opened(files.vqav2(tmp_path)), 31, seed=0)
    assert question_order(opened(files.vqav2(tmp_path)), 30, seed=0).epoch_length == 30
    with pytest.raises(ValueError, match=r"^answers\.train\.mine: questions = .* has not one question"):
        opened(source("llava", questions=write(tmp_path / "none.json", [])))


def test_a_files_questions_are_packed_one_by_one(tmp_path: Path) -> None:
    """A reply that makes up its entry is packed three times: as a turn, an answer, and the one to learn. The file's values go meanwhile.

    With all questions at once, and a packed form of each before they are joined, there would be seven of them.
    """
    said = [{"id": str(number), "conversations": talk("What is it?", f"{number} " * 4000)} for number in range(200)]
    path = write(tmp_path / "long.json", said)
    given = source("llava", questions=path)
    opened(given)  # what is imported on the way is not counted
    tracemalloc.start()
    questions = opened(given)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(questions) == 200
    assert peak < 4 * path.stat().st_size
