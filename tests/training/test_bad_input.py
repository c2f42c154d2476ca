"""What a user can get wrong is answered with one message, exit code 2 and no traceback, before a model is made."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megakd.runtime import checkpoint
from megakd.runtime.exits import EXIT_USER_ERROR
from support.runs import TINY_LLAMA, answering, ds_config, rows, train


def _refused(recipe: Path | str | None, *arguments: str | Path, sets: tuple[str, ...] = (), out: Path) -> str:
    """The message of a command that must be refused before any model is made: making one draws random numbers."""
    before = torch.get_rng_state()
    finished = train(recipe, "--out", out, *arguments, sets=sets)
    assert finished.code == EXIT_USER_ERROR, (finished.code, finished.out, finished.err)
    assert finished.err.startswith("error: ")
    assert "Traceback" not in finished.err
    assert torch.equal(torch.get_rng_state(), before), "a model was made before the error was found"
    assert not (out / "run.json").exists(), "a refused command leaves no run behind"
    return finished.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.stpes=3", ["optim.stpes", "unknown key", "did you mean 'optim.steps'", "tiny.toml"]),
        ("optim.steps=many", ["optim.steps = 'many'", "integer", "--set optim.steps=many"]),
        ("optim.lr=3e-4x", ["optim.lr = '3e-4x'", "number"]),
        ("data.train=WORLD/train/{00000..00009}.tar", ["data.train", "00003.tar"]),
        ("data.train=WORLD/nothing/*.tar", ["data.train", "WORLD/nothing/*.tar"]),
        ("data.train=[]", ["data.train"]),
        ("data.caption=caption", ["data.train", "data.caption", ".caption"]),
        ("optim.batch=601", ["optim.batch = 601", "600 samples"]),
        ("student.model=ViT-B-32", ["student", "`model`", "`architecture`"]),
        ("student.tokenizer=WORLD/nothing", ["student.tokenizer", "WORLD/nothing", "no such folder"]),
        ("student.tokenizer=WORLD/train", ["student.tokenizer", "WORLD/train"]),
        ("student.architecture.text_cfg.vocab_size=20", ["student.tokenizer", "vocab_size", "20"]),
        ("student.pretrained=nowhere.safetensors", ["student.pretrained", "nowhere.safetensors", "no such file"]),
        ("student.pretrained=laion2b", ["student.pretrained", "laion2b"]),
        ("objectives.similarity=1.0", ["objectives.similarity", "[teacher]"]),
        ("evaluation.retrieval.test=WORLD/nothing/*.tar", ["evaluation.retrieval.test", "WORLD/nothing"]),
        ("evaluation.zero_shot.test=WORLD/test", ["evaluation.zero_shot.test", "classnames.txt"]),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(
    recipe_file: Path, world: Path, tmp_path: Path, override: str, words: list[str]
) -> None:
    message = _refused(recipe_file, sets=(override.replace("WORLD", str(world)),), out=tmp_path / "run")
    assert all(word.replace("WORLD", str(world)) in message for word in words), message


def _with_model(recipe_file: Path, tmp_path: Path, name: str) -> Path:
    """The tiny recipe with a named student in place of the described one."""
    head, _, rest = recipe_file.read_text().partition("[student]")
    path = tmp_path / "named.toml"
    path.write_text(f'{head}[student]\nmodel = "{name}"\n\n[objectives]{rest.partition("[objectives]")[2]}')
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ViT-B-31", ["student.model = 'ViT-B-31'", "ViT-B-32"]),
        ("local-dir:nowhere/model", ["student.model", "nowhere/model", "open_clip_config.json"]),
    ],
)
def test_an_unknown_model_is_refused_with_the_nearest_or_the_file_it_lacks(
    recipe_file: Path, tmp_path: Path, name: str, words: list[str]
) -> None:
    message = _refused(_with_model(recipe_file, tmp_path, name), out=tmp_path / "run")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (("teacher.model=ViT-B-32",), ["teacher.pretrained", "weights", "'random'"]),
        (("teacher.model=ViT-B-32", "teacher.pretrained=laion3b"), ["teacher.pretrained = 'laion3b'", "laion2b"]),
        (("teacher.model=ViT-BB-32", "teacher.pretrained=random"), ["teacher.model = 'ViT-BB-32'", "ViT-B-32"]),
        (("teacher.model=local-dir:nowhere",), ["teacher.model", "nowhere", "train that model first"]),
    ],
)
def test_a_teacher_that_is_not_there_is_refused(recipe_file: Path, tmp_path: Path, teacher: tuple[str, ...], words: list[str]) -> None:
    message = _refused(recipe_file, sets=("objectives.similarity=1.0", *teacher), out=tmp_path / "run")
    assert all(word in message for word in words), message


def test_an_unknown_recipe_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    message = _refused("smoek", out=tmp_path / "run")
    assert "recipe 'smoek'" in message
    assert "'smoke'" in message


def test_a_deepspeed_literal_that_disagrees_is_refused_with_both_files(recipe_file: Path, tmp_path: Path) -> None:
    path = ds_config(tmp_path / "mine.json", train_batch_size=32)
    message = _refused(recipe_file, "--ds_config", path, out=tmp_path / "run")
    assert f"train_batch_size = 32 in {path} disagrees with optim.batch = 16 in {recipe_file}" in message


def test_a_batch_that_does_not_divide_by_the_micro_batch_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    path = ds_config(tmp_path / "mine.json", train_micro_batch_size_per_gpu=5)
    message = _refused(recipe_file, "--ds_config", path, out=tmp_path / "run")
    assert "train_micro_batch_size_per_gpu = 5" in message
    assert "optim.batch = 16" in message


def test_a_missing_deepspeed_file_or_checkpoint_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    assert "--ds_config nowhere.json: no such file" in _refused(recipe_file, "--ds_config", "nowhere.json", out=tmp_path / "run")
    assert "--resume nowhere: give auto, none, or" in _refused(recipe_file, "--resume", "nowhere", out=tmp_path / "run")


def test_an_empty_shard_set_is_refused(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    message = _refused(recipe_file, sets=(f"data.train={tmp_path}/empty.tar",), out=tmp_path / "run")
    assert "data.train" in message
    assert "empty.tar" in message


def test_pretrained_weights_of_another_architecture_are_refused(recipe_file: Path, tmp_path: Path) -> None:
    torch.save({"visual.conv1.weight": torch.zeros(3)}, tmp_path / "other.pt")
    finished = train(recipe_file, "--out", tmp_path / "run", sets=(f"student.pretrained={tmp_path}/other.pt",))
    assert finished.code == EXIT_USER_ERROR, finished.err
    assert "student" in finished.err
    assert "other.pt" in finished.err
    assert "visual.conv1.weight" in finished.err


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors"])
def test_a_weight_file_that_holds_code_is_refused_and_not_run(recipe_file: Path, tmp_path: Path, name: str) -> None:
    """A pickle that prints when it is loaded."""
    (tmp_path / name).write_bytes(b"cbuiltins\nprint\n(S'EXECUTED'\ntR.")
    finished = train(recipe_file, "--out", tmp_path / "run", sets=(f"student.pretrained={tmp_path}/{name}",))
    assert finished.code == EXIT_USER_ERROR
    assert "no file of plain tensors" in finished.err
    assert name in finished.err
    assert "EXECUTED" not in finished.out


def _with_corrupt_images(world: Path, folder: Path, every: int) -> str:
    """The training shards with the JPEG of every so-many-th sample overwritten, as a failing disk leaves it."""
    shutil.copytree(world / "train", folder, ignore=shutil.ignore_patterns("*.npy", "*.idx*"))
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            images = [member for member in tar if member.name.endswith(".jpg")]
        with shard.open("r+b") as file:
            for member in images[::every]:
                file.seek(member.offset_data)
                file.write(b"\0" * member.size)
    return f"data.train={folder}/*.tar"


def test_too_many_corrupt_images_end_the_run_and_name_the_limit(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", sets=(_with_corrupt_images(world, tmp_path / "bad", 3), "optim.steps=30"))
    assert finished.code == EXIT_USER_ERROR
    assert "data.max_bad_fraction = 0.01" in finished.err
    assert "corrupt_image" in finished.err
    assert ".tar: " in finished.err, "an example is named"


def test_a_few_corrupt_images_are_counted_in_the_metrics(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    sets = (_with_corrupt_images(world, tmp_path / "bad", 50), "optim.steps=30", "data.max_bad_fraction=0.2")
    finished = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert finished.code == 0, finished.err
    counted = [row["bad_samples"].get("corrupt_image", 0) for row in rows(tmp_path / "run")]
    assert counted[-1] > 0
    assert counted == sorted(counted)


def test_questions_that_are_too_long_are_judged_beside_the_pairs_and_name_the_length(
    recipe_file: Path, world: Path, tmp_path: Path
) -> None:
    """A tenth of the questions is too long: of questions and pairs together one in fifty, below the limit."""
    turns = [[("human", "is it red? " * (20 if number % 10 == 0 else 1)), ("gpt", "yes")] for number in range(100)]
    told = [{"id": number, "conversations": [{"from": who, "value": text} for who, text in turn]} for number, turn in enumerate(turns)]
    (tmp_path / "talk.json").write_text(json.dumps(told))
    text = f"answers.train.text={{ format = 'llava', questions = '{tmp_path}/talk.json' }}"
    reads = (f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer", "decoder.adapt=full")
    sets = (
        *reads,
        *answering(world)[1:6],
        text,
        "answers.batch=4",
        "answers.max_length=32",
        "data.max_bad_fraction=0.05",
        "optim.steps=20",
    )
    finished = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert finished.code == EXIT_USER_ERROR, finished.out + finished.err
    assert "questions are unusable" in finished.err
    assert "answers.train.text: 10 of 100 questions are unusable" in finished.err
    assert "too_long: question 0 (83 tokens, answers.max_length = 32)" in finished.err
    assert "Raise answers.max_length, or raise data.max_bad_fraction" in finished.err


@pytest.fixture
def file_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("file_limit")
def test_a_save_that_fails_ends_the_run_with_a_clear_error_and_keeps_the_earlier_checkpoint(recipe_file: Path, tmp_path: Path) -> None:
    run, sets = tmp_path / "run", ("optim.steps=4", "checkpoint.every=2")
    assert train(recipe_file, "--out", run, sets=sets).code == 0
    earlier, last = checkpoint.available(run)
    shutil.rmtree(last)
    (_, hard) = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    finished = train(recipe_file, "--out", run, sets=sets)
    assert finished.code == EXIT_USER_ERROR, finished.err
    assert "could not save" in finished.err
    assert "free some space" in finished.err
    assert "Traceback" not in finished.err
    assert checkpoint.latest_valid(run, print) == earlier


def test_a_disk_that_fills_during_training_ends_the_run_with_a_clear_error(recipe_file: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk ({mounted.stderr.strip()}); a file limit stands in for it in the test above")
    try:
        finished = train(recipe_file, "--out", disk / "run", sets=("optim.steps=12", "checkpoint.every=2", "checkpoint.keep=9"))
        assert finished.code == EXIT_USER_ERROR, finished.err
        assert "could not save" in finished.err
        assert "No space left" in finished.err
        assert checkpoint.latest_valid(disk / "run", print) is not None
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_run_folder_that_cannot_be_written_is_named_without_a_traceback(recipe_file: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("in the way")
    finished = train(recipe_file, "--out", tmp_path / out)
    assert finished.code == 2
    assert str(tmp_path / "file") in finished.err
    assert "--out" in finished.err
