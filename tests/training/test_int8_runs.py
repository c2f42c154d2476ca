"""Runs and stores on a teacher in 8 bit whose activations have outliers: compared with 16 bit at the start, stopped or calibrated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megakd.benchmarks import outliers
from megakd.export import clip_folder
from megakd.models import clip
from megakd.recipe import Teacher
from megakd.recipe import load as recipes
from megakd.runtime.launch import World
from megakd.teachers.embed import EmbedJob, EmbedRequest
from support.runs import KD, TEACHER, curve, rows, train

ALONE = World(0, 1, torch.device("cpu"))
ARCHITECTURE = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 48, "patch_size": 16, "width": 96, "layers": 3, "head_width": 32},
    "text_cfg": {"context_length": 24, "width": 96, "heads": 3, "layers": 3},
}
STEPS = "optim.steps=3"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher's folder. Its images of the shapes world differ enough for an agreement to mean something."""
    torch.manual_seed(0)
    built = clip.build(clip.resolve(Teacher(architecture=ARCHITECTURE, pretrained="random"), "teacher"), torch.device("cpu"))
    assert outliers.add(built.clip, share=0.03) > 0
    folder = tmp_path_factory.mktemp("outliers") / "model"
    clip_folder.write_model(folder, {f"clip.{name}": value for name, value in built.clip.state_dict().items()}, built)
    return f"local-dir:{folder}"


def _sets(model: str, *more: str) -> tuple[str, ...]:
    kept = [one for one in KD if one not in TEACHER]
    return (*kept, f"teacher={{ model = '{model}' }}", "teacher.mode=zero3_int8", "teacher.int8_product=int_mm", STEPS, *more)


@pytest.fixture(scope="module")
def calibrated(model: str, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "calibrated"
    finished = train(recipe_file, "--out", out, sets=_sets(model, "teacher.calibration=16"))
    assert finished.code == 0, finished.err
    (out / "log").write_text(finished.out, encoding="utf-8")
    return out


def test_a_run_that_would_lose_too_much_stops_before_anything_is_trained_and_says_what_helps(
    model: str, recipe_file: Path, tmp_path: Path
) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", sets=_sets(model))
    assert finished.code == 2
    assert "in 8 bit it loses too much" in finished.err
    assert "teacher.calibration = 64" in finished.err
    assert "Traceback" not in finished.err
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert train(recipe_file, "--out", tmp_path / "run", sets=_sets(model, "teacher.calibration=64")).code == 0


def test_a_calibrated_run_says_its_agreement_and_learns_what_it_learns_from_the_teacher_in_16_bit(
    model: str, recipe_file: Path, calibrated: Path, tmp_path: Path
) -> None:
    log = (calibrated / "log").read_text(encoding="utf-8")
    assert "teacher in 8 bit (int_mm): outliers moved into the weights by 16 pairs (SmoothQuant" in log
    assert "compared with its matrices in float32: centred cosine 0.99" in log
    wide = (*(one for one in _sets(model) if "int8" not in one), "teacher.mode=replicated")
    assert train(recipe_file, "--out", tmp_path / "wide", sets=wide).code == 0
    assert [row["loss"] for row in rows(calibrated)] == pytest.approx([row["loss"] for row in rows(tmp_path / "wide")], rel=3e-3)


def test_another_start_with_a_whole_teacher_has_the_same_curve_to_the_last_bit(
    model: str, recipe_file: Path, calibrated: Path, tmp_path: Path
) -> None:
    whole = _sets(model, "teacher.calibration=16", "teacher.mode=replicated_int8")
    assert train(recipe_file, "--out", tmp_path / "whole", sets=whole).code == 0
    assert curve(tmp_path / "whole") == curve(calibrated)


def test_as_on_a_gpu_in_bf16_it_is_calibrated_and_compared_too(
    model: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAKD_PRECISION", "bf16")
    stopped = train(recipe_file, "--out", tmp_path / "stopped", sets=_sets(model))
    assert (stopped.code, "in 8 bit it loses too much" in stopped.err) == (2, True), stopped.err
    for mode in ("zero3_int8", "replicated_int8"):
        done = train(recipe_file, "--out", tmp_path / mode, sets=_sets(model, f"teacher.mode={mode}", "teacher.calibration=16"))
        assert done.code == 0, done.err
        assert "compared with its matrices in bfloat16: centred cosine 0.99" in done.out
    assert curve(tmp_path / "zero3_int8") == curve(tmp_path / "replicated_int8")


def test_a_limit_that_is_lowered_lets_it_run_and_0_compares_nothing(model: str, recipe_file: Path, tmp_path: Path) -> None:
    lowered = train(recipe_file, "--out", tmp_path / "lowered", sets=_sets(model, "teacher.int8_agreement=0.5"))
    assert (lowered.code, "compared with its matrices" in lowered.out) == (0, True)
    unasked = train(recipe_file, "--out", tmp_path / "unasked", sets=_sets(model, "teacher.int8_agreement=0.0"))
    assert (unasked.code, "compared" in unasked.out) == (0, False)


def test_a_store_is_compared_too(model: str, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def job(*more: str) -> EmbedJob:
        sets = _sets(model, "teacher.mode=replicated_int8", *more)
        return EmbedJob(recipes.load(str(recipe_file), sets)[0], EmbedRequest(tmp_path / "store"), ALONE)

    with pytest.raises(ValueError, match="in 8 bit it loses too much"):
        job().embed()
    job("teacher.calibration=16").embed()
    assert "outliers moved into the weights by 16 pairs" in capsys.readouterr().out
    assert job("teacher.calibration=16").check(sampled=32).worst_cosine > 0.999


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (("teacher.calibration=8",), "calibration is for int8 weights"),
        (("teacher.int8_product=int_mm",), "int8_product is for int8 weights"),
        (("teacher.int8_agreement=0.5",), "int8_agreement is for int8 weights"),
        (("teacher.mode=zero3_int8", "teacher.int8_product=dequantise", "teacher.outlier_threshold=6.0"), "set outlier_threshold to 0"),
        (("teacher.mode=zero3_int8", "teacher.int8_product=fast"), "int8_product"),
        (("teacher.mode=zero3_int8", "teacher.int8_agreement=1.5"), "int8_agreement"),
        (("teacher.mode=zero3_int8", "teacher.calibration=-1"), "calibration"),
    ],
)
def test_settings_that_would_do_nothing_are_refused_with_the_remedy(recipe_file: Path, sets: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        recipes.load(str(recipe_file), (*KD, *sets))
