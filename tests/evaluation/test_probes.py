"""Linear probes and nearest neighbours: the formulas against references, and as a run and `megakd evaluate --model` score them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megakd.data.shapes import write_world
from megakd.evaluation.probes import fit, linear, neighbours, patterns
from megakd.evaluation.report import lines, numbers
from megakd.evaluation.sets import open_sets
from megakd.recipe import load as recipes
from megakd.runtime.exits import EXIT_USER_ERROR
from megakd.runtime.launch import World
from support import REPOSITORY
from support.runs import megakd, ran, run_ranks, settings
from support.shards import jpeg, write_tar


def clusters(seed: int, count: int, spread: float) -> tuple[Tensor, Tensor]:
    """Points around three centres of eight dimensions, and whose they are."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.arange(count) % 3
    return centres[labels] + spread * torch.randn(count, 8, generator=draw, dtype=torch.float64), labels


def test_the_vote_is_dinos() -> None:
    train, classes = clusters(0, 90, 1.5)
    test, _ = clusters(1, 40, 1.5)
    for most in (1, 20, 500):
        expected = []
        for query in test:
            cosines = [float(query @ row / query.norm() / row.norm()) for row in train]
            near = sorted(zip(cosines, classes.tolist(), strict=True), reverse=True)[:most]
            votes = [sum(math.exp(cosine / 0.07) for cosine, kind in near if kind == asked) for asked in range(3)]
            expected.append(votes.index(max(votes)))
        assert neighbours(train, classes, test, most, 0.07).tolist() == expected


def test_the_classifier_is_where_the_gradient_of_cross_entropy_and_l2_is_zero() -> None:
    train, classes = clusters(0, 60, 2.0)
    weight, bias = (value.requires_grad_(True) for value in fit(train, classes, 3, 0.1))
    loss = torch.nn.functional.cross_entropy(train @ weight.T + bias, classes) + 0.1 / 2 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-5


def test_the_l2_weight_is_chosen_for_images_that_were_not_fitted_and_scales_of_channels_do_not_count() -> None:
    train, classes = clusters(0, 300, 0.7)
    test, truth = clusters(1, 200, 0.7)
    found, l2 = linear(train, classes, test)
    assert (found == truth).double().mean() > 0.95
    scale = 10.0 ** torch.arange(-4, 4, dtype=torch.float64)
    again, same = linear(train * scale + 5, classes, test * scale + 5)
    assert same == l2
    assert torch.equal(found, again)
    noise, _ = linear(torch.randn(60, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64), torch.arange(60) % 3, test)
    assert len(noise) == 200
    constant, _ = linear(torch.ones(30, 2, dtype=torch.float64), torch.arange(30) % 3, torch.ones(4, 2, dtype=torch.float64))
    assert len(set(constant.tolist())) == 1


def test_shards_are_given_as_they_are_and_folders_as_clip_benchmarks(tmp_path: Path) -> None:
    assert patterns("/data/a/{0..3}.tar", "train") == "/data/a/{0..3}.tar"
    assert patterns(f"{tmp_path}/", "test") == f"{tmp_path}/test/*.tar"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another world, whose single things are those to learn from."""
    out = tmp_path_factory.mktemp("labelled") / "shapes"
    return write_world(out, train=1, test=2, seed=1, zeroshot_per_class=3).out


def test_a_run_is_probed_at_its_end_and_so_is_its_model_on_two_ranks(
    recipe_file: Path, world: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = f"train = '{labelled}/zeroshot/test/*.tar', test = '{world}/zeroshot'"
    probe = f"evaluation.probe.things={{ {parts}, layer = -1 }}"
    run = ran(recipe_file, tmp_path / "run", probe, "optim.steps=3", "evaluation.batch=20")
    results = json.loads((run / "evaluation.json").read_text())
    found = results["probe"]["things"]
    assert (found["images"], found["learned"], found["classes"]) == (70, 105, 35)
    assert (found["neighbours"], found["unreadable"], found["unknown"]) == (20, 0, 0)
    assert all(0 <= found[f"{of}{kind}"]["top1"] <= 1 for of in ("", "patch_") for kind in ("linear", "knn"))
    assert found["patch_linear"]["top1"] > 2 / 35  # colours show in any tower
    assert numbers(results)["probe/things/patch_knn/top1"] == found["patch_knn"]["top1"]
    assert "probe things of 70 images: pooled linear" in lines(results)
    unlike = f"evaluation.probe.things.test={world}/zeroshot_held_out"
    assert megakd("evaluate", run, "--set", unlike) == EXIT_USER_ERROR
    assert "evaluation.probe.things.test: no image is of a class that an image of its train has" in capsys.readouterr().err
    model = ("--model", f"local-dir:{run / 'model'}", "--recipe", run / "run.json", "--out", tmp_path / "two.json")
    run_ranks(REPOSITORY / "megakd" / "cli" / "__main__.py", "evaluate", *model)
    assert json.loads((tmp_path / "two.json").read_text())["probe"]["things"] == found


def test_class_folders_are_probed_as_shards_of_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, classes = tmp_path / "images", ("ant", "bee", "cat")
    for part, count in (("train", 8), ("val", 3)):
        members = []
        for label, name in enumerate(classes):
            (images / part / name).mkdir(parents=True)
            for number in range(count):
                data = jpeg(100 * label + 10 * number + len(part))
                (images / part / name / f"{number}.JPEG").write_bytes(data)
                members += [(f"{label}_{number}.jpg", data), (f"{label}_{number}.cls", b"%d" % label)]
        write_tar(tmp_path / "tars" / {"train": "train", "val": "test"}[part] / "0.tar", members)
    wanted = [f"evaluation.probe.{kind}={{ train = '{tmp_path}/{kind}', test = '{tmp_path}/{kind}' }}" for kind in ("images", "tars")]
    model = ("--model", "timm:test_vit", "--pretrained", "random", *settings("data.workers=0"))
    assert megakd("evaluate", *model, *settings(*wanted), "--out", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())["probe"]
    assert found["images"] == found["tars"]
    assert (found["tars"]["learned"], found["tars"]["images"], found["tars"]["classes"]) == (24, 9, 3)
    (images / "val" / "bee").rename(images / "val" / "dog")
    assert megakd("evaluate", *model, *settings(wanted[0])) == EXIT_USER_ERROR
    assert "evaluation.probe.images: train and test have other class folders (bee, dog)" in capsys.readouterr().err


def test_a_set_without_labels_is_refused_by_its_key(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "0.tar", [("a.jpg", jpeg(1)), ("a.cls", b"first")])
    for given, message in (
        (f"train = '{world}/test/*.tar', test = '{world}/zeroshot'", r"evaluation\.probe\.mine\.train: .* has no \.cls member"),
        (f"train = '{tmp_path}', test = '{world}/zeroshot'", r"evaluation\.probe\.mine\.train: .* its \.cls member cannot be read"),
        (f"train = '{world}/zeroshot/test/*.tar', test = '{tmp_path}'", r"evaluation\.probe\.mine\.test: "),
    ):
        recipe, _ = recipes.load(str(recipe_file), [f"evaluation.probe.mine={{ {given} }}"])
        with pytest.raises(ValueError, match=message):
            open_sets(recipe, World(0, 1, torch.device("cpu")))
