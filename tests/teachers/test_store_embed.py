"""`megakd embed`: one store whatever the ranks and the kills, refused where it is another's, and checked against the teacher."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from megakd.data.store import writer
from megakd.data.store.reader import Store, StoreError, part_path, read_manifest
from megakd.data.store.writer import StoreLock
from megakd.data.transforms import TowerView
from megakd.models import clip
from megakd.models.fingerprint import behaviour, fingerprint, preprocessing
from megakd.recipe import Recipe, Teacher
from megakd.recipe import load as recipes
from megakd.runtime.launch import World
from megakd.teachers import embed
from megakd.teachers.build import open_store
from megakd.teachers.embed import EmbedJob, EmbedRequest
from support import PROGRAMS
from support.processes import python
from support.runs import TEACHER, finish, run_ranks, wait_for
from support.shards import ByteTokenizer, pair, write_tar

ALONE = World(0, 1, torch.device("cpu"))
PARTS = 38  # of 16 samples
PROGRAM = PROGRAMS / "embed.py"


@pytest.fixture(scope="module")
def recipe(recipe_file: Path) -> Recipe:
    return recipes.load(str(recipe_file), TEACHER)[0]


@pytest.fixture(scope="module")
def reference(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the world's 600 samples, two views each, that nobody disturbed."""
    out = tmp_path_factory.mktemp("reference") / "store"
    EmbedJob(recipe, EmbedRequest(out, 2), ALONE, part=16).embed()
    return out


@pytest.fixture
def store(reference: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "store"))


def job(recipe: Recipe, out: Path, views: int = 2, **more) -> EmbedJob:
    return EmbedJob(recipe, EmbedRequest(out, views, **more), ALONE, part=16)


def changed(recipe: Recipe, *overrides: str) -> Recipe:
    path = Path(str(recipe.data.train)).parents[1] / "changed.json"
    path.write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    return recipes.load(str(path), overrides)[0]


def remade(store: Path, **changes: Any) -> None:
    """Another manifest for the same parts."""
    found = read_manifest(store)
    assert found is not None
    writer.start(store, replace(found, **changes))


def assert_equal_stores(one: Path, other: Path) -> None:
    names = sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()) == names
    assert len(names) == PARTS + 2
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def arguments(recipe_file: Path, out: Path) -> list[str | Path]:
    return [PROGRAM, recipe_file, out, "2", "16", json.dumps(list(TEACHER))]


@pytest.mark.timeout(300)
def test_two_ranks_finish_a_killed_jobs_store_as_one_rank_writes_it(recipe_file: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    first = python(*arguments(recipe_file, out))
    wait_for(lambda: len(list(out.glob("parts/0*"))) >= 3, first)
    first.kill()
    first.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/0*")}
    assert 3 <= len(done) < PARTS
    (out / "parts" / ".000037.safetensors.half").write_bytes(b"half")
    again, _ = run_ranks(*arguments(recipe_file, out))
    assert f"{len(done)} of {PARTS} parts are there" in again
    assert {name: (out / "parts" / name).stat().st_mtime_ns for name in done} == done
    assert_equal_stores(out, reference)


def test_a_complete_store_is_left_alone_and_no_teacher_is_loaded(recipe: Recipe, reference: Path, store: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(embed, "live_teacher", None)
    job(recipe, store).embed()
    assert_equal_stores(store, reference)
    assert "complete, 600 samples in 38 parts, 2 views each\n" in capsys.readouterr().out


def test_missing_and_truncated_parts_are_written_again_and_come_out_the_same(recipe: Recipe, reference: Path, store: Path) -> None:
    part_path(store, 3).unlink()
    part_path(store, 9).write_bytes(part_path(store, 9).read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"2 of 38 parts are not usable") as caught:
        job(recipe, store).check()
    assert f"{part_path(store, 9)}: " in str(caught.value)
    job(recipe, store).embed()
    assert_equal_stores(store, reference)


@pytest.mark.parametrize(
    "left", [(), ("parts/",), ("parts/", ".manifest.json.x1y2.partial"), ("parts/", "parts/.000000.safetensors.z.partial")]
)
def test_a_job_killed_before_its_first_manifest_is_resumed(recipe: Recipe, reference: Path, tmp_path: Path, left: tuple[str, ...]) -> None:
    out = tmp_path / "store"
    out.mkdir()
    (out / "lock").write_text("process 1 on a machine that is gone\n")
    for name in left:
        (out / name).mkdir() if name.endswith("/") else (out / name).write_text("half")
    job(recipe, out).embed()
    assert_equal_stores(out, reference)


def test_a_folder_with_parts_and_no_manifest_is_somebody_elses(recipe: Recipe, store: Path) -> None:
    (store / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"holds parts and no manifest\.json"):
        job(recipe, store).embed()


def test_a_second_job_is_refused_and_changes_nothing(recipe: Recipe, recipe_file: Path, reference: Path, store: Path) -> None:
    part_path(store, 3).unlink()
    with StoreLock(store):  # a lock is a process's own, so the second job is another process
        second = finish(python(*arguments(recipe_file, store)))
    assert second.code == 2, second.out
    assert f"process {os.getpid()} on" in second.out
    assert not part_path(store, 3).exists()
    job(recipe, store).embed()
    assert_equal_stores(store, reference)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=5", "seed: 0 in the store, 5 in the recipe"),
        ("views.crop_scale=[0.9, 1.0]", "views.crop_scale: [0.5, 1.0] in the store, [0.9, 1.0] in the recipe"),
        ("data.transparency=black", "data.transparency: None in the store, 'black' in the recipe"),
        ("data.orientation=ignore", "data.orientation: None in the store, 'ignore' in the recipe"),
        ("data.decode=scaled", "data.decode: None in the store, 'scaled' in the recipe"),
        ("data.resampling=torch", "data.resampling: None in the store, 'torch' in the recipe"),
        ("views.erase={probability = 0.5}", "views.erase.probability: None in the store, 0.5 in the recipe"),
        ("teacher.architecture.vision_cfg.layers=2", "teacher.vision_cfg.layers: 1 in the store, 2 in the recipe"),
        ("teacher.architecture.vision_cfg.image_size=32", "preprocess.size: [48, 48] in the store, [32, 32] in the recipe"),
        ("teacher.architecture.text_cfg.context_length=20", "tokenizer: '"),
    ],
)
def test_a_store_of_another_teacher_seed_or_views_is_refused_by_difference(recipe: Recipe, store: Path, override: str, line: str) -> None:
    other = job(changed(recipe, override), store)
    with pytest.raises(StoreError, match="holds other embeddings than the recipe asks for") as caught:
        open_store(store, other.recipe, other.description, other.shards, ALONE)
    assert line in str(caught.value)
    with pytest.raises(StoreError, match="a store of other embeddings is there") as caught:
        other.embed()
    assert line in str(caught.value)
    with pytest.raises(StoreError):
        other.check()


def test_a_store_of_other_data_is_refused(recipe: Recipe, store: Path, tmp_path: Path, world: Path) -> None:
    """The same names and numbers of samples, other pictures: their bytes tell."""
    shutil.copytree(world / "train", tmp_path / "train")
    first = sorted((tmp_path / "train").glob("*.tar"))[0]
    write_tar(first, [member for number in range(200) for member in pair(f"{number:09d}", number)])
    with pytest.raises(StoreError, match=r"data\.bytes: \d+ in the store, \d+ in the recipe"):
        job(changed(recipe, f"data.train={tmp_path}/train/*.tar"), store).check()


def test_another_number_of_views_is_refused(recipe: Recipe, store: Path) -> None:
    with pytest.raises(StoreError, match=r"layout\.views: 2 in the store, 3 in the recipe"):
        job(recipe, store, views=3).embed()
    with pytest.raises(StoreError, match=r"holds 2 views of each image, not --views 3"):
        job(recipe, store, views=3).check()


INT8 = "teacher.mode=replicated_int8"
# What "auto" chooses depends on the machine: a CPU without VNNI dequantises.
INT_MM, DEQUANTISE = "teacher.int8_product=int_mm", "teacher.int8_product=dequantise"


@pytest.mark.parametrize(
    ("made_by", "used_by", "line"),
    [
        ((), (INT8,), "made.int8: False in the store, True in the recipe"),
        ((), ("teacher.mode=zero3_int8", "teacher.calibration=8"), "made.calibration: None in the store, '8 pairs, SmoothQuant"),
        ((INT8,), (), "made.int8: True in the store, False in the recipe"),
        ((INT8,), (INT8, "teacher.outlier_threshold=6.0"), "made.outlier_threshold: 0.0 in the store, 6.0 in the recipe"),
        ((INT8, INT_MM), (INT8, DEQUANTISE), "made.product: "),
        ((INT8, "teacher.calibration=8"), (INT8, "teacher.calibration=9"), "made.calibration: '8 pairs, SmoothQuant"),
    ],
)
def test_a_store_that_was_computed_otherwise_is_neither_gone_on_with_nor_used(
    recipe: Recipe, store: Path, made_by: tuple[str, ...], used_by: tuple[str, ...], line: str
) -> None:
    first, second = (job(changed(recipe, *how), store) for how in (made_by, used_by))
    remade(store, made=first._made(), parts=())
    for attempt in (second.embed, lambda: open_store(store, second.recipe, second.description, second.shards, ALONE)):
        with pytest.raises(StoreError) as caught:
            attempt()
        assert line in str(caught.value)


@pytest.mark.parametrize("mode", ["replicated", "zero3", "replicated_int8", "zero3_int8"])
def test_a_store_from_before_calibration_is_that_of_the_same_mode_whole_or_partitioned(recipe: Recipe, store: Path, mode: str) -> None:
    int8 = mode.endswith("int8")
    old = {"precision": "fp32", "int8": int8, "outlier_threshold": 0.0 if int8 else None}
    remade(store, made=old)
    asked = job(changed(recipe, f"teacher.mode={mode}", *[INT_MM] * int8), store)
    assert open_store(store, asked.recipe, asked.description, asked.shards, ALONE).layout.views == 2
    other = job(changed(recipe, "teacher.mode=replicated" if int8 else INT8), store)
    with pytest.raises(StoreError, match=r"made\.int8"):
        open_store(store, other.recipe, other.description, other.shards, ALONE)


def test_an_old_store_with_a_threshold_is_read_and_says_what_it_is(recipe: Recipe, store: Path) -> None:
    remade(store, made={"precision": "fp32", "int8": True, "outlier_threshold": 6.0})
    asked = job(changed(recipe, INT8, INT_MM, "teacher.outlier_threshold=6.0"), store)
    opened = open_store(store, asked.recipe, asked.description, asked.shards, ALONE)
    assert "samples depended on their neighbours in the batch" in opened.outline()


def test_a_check_recomputes_rows_and_finds_them_equal_to_rounding(recipe: Recipe, store: Path, capsys) -> None:
    found = job(recipe, store).check(sampled=64)
    assert found.samples == 64
    assert 0.99999 < found.mean_cosine <= 1 + 1e-9
    assert 0.9999 < found.worst_cosine <= found.mean_cosine
    assert "64 random samples recomputed: cosine mean 0.99999" in capsys.readouterr().out


def test_a_check_finds_one_flipped_bit(recipe: Recipe, store: Path) -> None:
    path = part_path(store, 20)
    content = bytearray(path.read_bytes())
    content[-700] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"1 parts were changed after they were written \(checksum\): .*000020\.safetensors"):
        job(recipe, store).check(sampled=1)


def test_a_check_finds_wrong_values_whose_checksums_are_right(recipe: Recipe, store: Path) -> None:
    manifest = read_manifest(store)
    assert manifest is not None
    for number in range(PARTS):
        found = Store.open(store)
        rows = [torch.from_numpy(array.copy()) for array in found._arrays(number).values()]
        image, text = (row.view(torch.bfloat16) for row in rows[:2])
        writer.write_part(store, replace(manifest, parts=()), number, image.flip(1), text, rows[2].bool())
    writer.finish(store, replace(manifest, parts=()))
    with pytest.raises(StoreError, match=r"recomputed embeddings differ from the stored ones: .*view [01]\)"):
        job(recipe, store).check(sampled=32)


def test_samples_that_cannot_be_used_are_missing_in_the_store_and_counted(recipe: Recipe, tmp_path: Path, capsys) -> None:
    members = [member for number in range(70) for member in pair(f"good{number:02d}", number)]
    members[10 * 3] = ("good10.jpg", b"no picture")
    write_tar(tmp_path / "shards" / "0.tar", members)
    spoiled = changed(recipe, f"data.train={tmp_path}/shards/0.tar")
    out = tmp_path / "store"
    job(spoiled, out).embed()
    assert "complete, 69 samples in 5 parts, 2 views each; 1 samples cannot be used and are missing in it" in capsys.readouterr().out
    rows = Store.open(out).read(torch.arange(70).numpy(), torch.zeros(70, dtype=torch.long).numpy())
    assert rows.known.logical_not().nonzero().flatten().tolist() == [10]
    assert job(spoiled, out).check().worst_cosine > 0.999


def test_embeddings_are_the_live_teachers_on_the_stored_views(recipe: Recipe, tmp_path: Path) -> None:
    made = job(recipe, tmp_path / "store", dtype="fp32")
    made.embed()
    store = Store.open(tmp_path / "store")
    teacher = embed.live_teacher(recipe, made.description, ALONE, made.shards, piece=64)
    index, view = torch.tensor([0, 599, 16, 15, 300]), torch.tensor([1, 0, 1, 0, 1])
    pixels, tokens = made._source.see_all(index.numpy(), view.numpy())
    live = teacher.embed(embed.normalise(pixels, teacher.towers.preprocess, torch.float32), tokens)
    rows = store.read(index.numpy(), view.numpy())
    torch.testing.assert_close(rows.image, live.image, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rows.text, live.text, atol=1e-6, rtol=1e-5)
    assert torch.tensor(store.manifest.scale) == live.scale
    assert store.manifest.bias is None


def test_a_part_is_a_function_of_the_data_alone() -> None:
    assert [writer.part_size(samples) for samples in (10, 600, 100_000, 12_800_000)] == [64, 64, 391, 4096]


# What a teacher is known by


@pytest.mark.parametrize(
    ("model", "tag"),
    [("ViT-B-32", "laion2b_s34b_b79k"), ("RN50-quickgelu", "openai"), ("EVA02-B-16", "merged2b_s8b_b131k"), ("PE-Core-B-16", "meta")],
)
def test_the_preprocessing_told_from_a_description_is_that_of_the_built_model(model: str, tag: str, monkeypatch) -> None:
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: "")
    description = clip.resolve(Teacher(model=model, pretrained=tag), "teacher")
    with torch.device("meta"):
        built = open_clip.create_model(model, pretrained=tag, load_weights=False, device="meta")
    expected = open_clip.transform.PreprocessCfg(**{key: built.visual.preprocess_cfg[key] for key in vars(preprocessing(description))})
    assert TowerView(preprocessing(description), len) == TowerView(expected, len)


def test_a_tokenizer_is_known_by_what_it_does(world: Path) -> None:
    plain, short = open_clip.SimpleTokenizer(context_length=77), open_clip.SimpleTokenizer(context_length=76)
    own = open_clip.tokenizer.HFTokenizer(str(world / "tokenizer"), context_length=77)
    assert behaviour(plain) == behaviour(open_clip.get_tokenizer("ViT-B-32"))
    assert len({behaviour(plain), behaviour(short), behaviour(own), behaviour(ByteTokenizer(77))}) == 4


def test_weights_are_known_by_their_content_wherever_they_lie(recipe: Recipe, tmp_path: Path) -> None:
    from megakd.export import clip_folder

    settings = recipe.teacher
    assert settings is not None
    torch.manual_seed(0)
    built = clip.build(clip.resolve(settings, "teacher"), torch.device("cpu"))
    weights = {f"clip.{name}": value for name, value in built.clip.state_dict().items()}
    found = []
    for folder in ("here", "there"):
        clip_folder.write_model(tmp_path / folder, weights, built)
        found.append(fingerprint(clip.resolve(Teacher(model=f"local-dir:{tmp_path / folder}"), "teacher"), 0)["weights"])
    assert found[0]["sha256"] == found[1]["sha256"] is not None
    weights["clip.visual.proj"] = weights["clip.visual.proj"] + 1e-3
    clip_folder.write_model(tmp_path / "there", weights, built)
    other = fingerprint(clip.resolve(Teacher(model=f"local-dir:{tmp_path / 'there'}"), "teacher"), 0)["weights"]
    assert other["sha256"] != found[0]["sha256"]
    assert fingerprint(clip.resolve(settings, "teacher"), 0)["weights"] != fingerprint(clip.resolve(settings, "teacher"), 1)["weights"]
