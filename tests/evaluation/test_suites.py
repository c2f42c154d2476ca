"""Lists of evaluation sets in DataComp's layout: which sets are there, by which metric each counts, what the averages are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from megakd.evaluation import benchmark_suite, zero_shot
from megakd.evaluation.benchmark_suite import open_suite
from megakd.runtime.exits import EXIT_USER_ERROR
from support.runs import megakd, ran, settings

SUITE = """
title = "mine"
[sets]
"a/seen" = { name = "Seen" }
unseen = { name = "Unseen", metric = "mean_per_class_recall" }
worst = { name = "Worst", metric = "top5", instead = "acc_wg", folder = "elsewhere" }
pairs = { name = "Pairs", kind = "retrieval", metric = "mean_R@1" }
absent = { name = "Absent" }
game = { name = "Game", skipped = "no images" }
[groups]
"Seen ones" = ["a/seen", "unseen"]
Hopeless = ["worst", "absent", "game"]
Average = []
"""


@pytest.fixture
def sets(world: Path, tmp_path: Path) -> Path:
    for name, of in (("wds_a-seen_test", "zeroshot"), ("wds_unseen", "zeroshot_held_out"), ("elsewhere", "zeroshot"), ("wds_pairs", "")):
        (tmp_path / "sets").mkdir(exist_ok=True)
        (tmp_path / "sets" / name).symlink_to(world / of, target_is_directory=True)
    (tmp_path / "suite.toml").write_text(SUITE)
    return tmp_path / "sets"


def test_a_run_is_scored_on_what_is_there_and_averages_say_of_what_they_are(
    sets: Path, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = ran(recipe_file, tmp_path / "run", "optim.steps=3")
    capsys.readouterr()
    assert megakd("evaluate", run, "--suite", tmp_path / "suite.toml", "--data", sets) == 0
    shown, found = capsys.readouterr().out, json.loads((run / "evaluation.json").read_text())
    suite, zero = found["suite"], found["zero_shot"]
    seen, unseen = zero["a/seen"]["top1"], zero["unseen"]["mean_per_class_recall"]
    pairs = found["retrieval"]["pairs"]["mean_R@1"]
    assert suite["averages"] == {
        "Seen ones": {"score": pytest.approx((seen + unseen) / 2), "over": 2, "sets": 2},
        "Hopeless": {"score": None, "over": 0, "sets": 3},
        "Average": {"score": pytest.approx((seen + unseen + pairs) / 3), "over": 3, "sets": 6},
    }
    assert suite["missing"] == ["absent"]
    assert suite["sets"]["worst"] == {
        "name": "Worst",
        "metric": "top5",
        "score": zero["worst"]["top5"],
        "counts": False,
        "instead": "acc_wg",
    }
    assert "over 3 of 6 sets" in shown
    assert "in no average: the suite's own metric is acc_wg" in shown
    assert "1 of 5 sets are not in" in caplog.text
    assert "worst is scored by top5, not by its own acc_wg" in caplog.text
    assert "game is not scored: no images" in caplog.text


def test_datacomps_list_has_its_38_sets_and_groups(tmp_path: Path) -> None:
    for name in ("wds_imagenet1k_test", "wds_vtab-caltech101_test", "wds_imagenet-a"):
        (tmp_path / name).mkdir()
    suite = open_suite("datacomp38", tmp_path)
    assert suite.found == {
        "vtab/caltech101": tmp_path / "wds_vtab-caltech101_test",
        "imagenet1k": tmp_path / "wds_imagenet1k_test",
        "imagenet-a": tmp_path / "wds_imagenet-a",
    }
    spec = suite.spec
    assert len(spec.sets) == 38
    assert {name: len(keys) for name, keys in spec.groups.items()} == {
        "ImageNet": 1, "ImageNet dist. shifts": 6, "VTAB": 13, "Retrieval": 3, "Average": 0
    }  # fmt: skip
    assert [key for key, one in spec.sets.items() if one.metric == "mean_per_class_recall"] == [
        "vtab/caltech101", "fgvc_aircraft", "vtab/flowers", "vtab/pets"
    ]  # fmt: skip
    assert sum(one.instead is not None for one in spec.sets.values()) == 3


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (("", ""), (), "--suite: give the folder of its sets as well, with --data"),
        (("", ""), ("--data", "{folder}/nowhere"), "nowhere: no such folder; it holds the suite's sets, as wds_a-seen_test"),
        (("", ""), ("--data", "{folder}"), "none of the 5 sets of"),
        (('"absent", "game"', '"abscent"'), ("--data", "{folder}/sets"), "groups.Hopeless: did you mean 'absent'? no set is called"),
        (('metric = "top5"', 'metric = "top3"'), ("--data", "{folder}/sets"), "metric = 'top3': a zero_shot set has top1, top5"),
        (("title", "tilte"), ("--data", "{folder}/sets"), "tilte: unknown key; did you mean 'title'"),
    ],
)  # fmt: skip
def test_suites_that_do_not_fit_are_one_message(
    sets: Path, tmp_path: Path, change: tuple[str, str], arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sets.parent / "suite.toml"
    path.write_text(SUITE.replace(*change) if change[0] else SUITE)
    given = [part.format(folder=tmp_path) for part in arguments]
    assert megakd("evaluate", "--model", "ViT-B-32", "--pretrained", "random", "--suite", path, *given) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def test_a_suite_that_is_not_there_names_the_shipped_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", "ViT-B-32", "--pretrained", "random")
    assert megakd("evaluate", *model, "--suite", "datacomp", "--data", tmp_path) == EXIT_USER_ERROR
    assert "--suite datacomp: no such file; give a .toml file, or one of the shipped: datacomp38" in capsys.readouterr().err
    assert benchmark_suite.shipped() == ["datacomp38"]
    assert megakd("evaluate", *model, "--data", tmp_path, *settings("evaluation.retrieval.a=b")) == EXIT_USER_ERROR
    assert "--data: goes with --suite" in capsys.readouterr().err


def test_recall_and_f1_by_class_are_scikit_learns() -> None:
    draw = torch.Generator().manual_seed(0)
    classes = torch.nn.functional.normalize(torch.randn(9, 4, generator=draw), dim=1)
    labels = torch.randint(0, 7, (60,), generator=draw)  # two classes without an image
    images = torch.nn.functional.normalize(classes[labels] + 0.6 * torch.randn(60, 4, generator=draw), dim=1)
    found: dict[str, Any] = zero_shot.accuracies(images, labels, classes)
    guessed = (images @ classes.T).argmax(dim=1)
    assert guessed.max() > 6
    assert found["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, guessed), abs=1e-9)
    theirs = f1_score(labels, guessed, average="macro", labels=labels.unique())  # as WILDS' F1
    assert found["f1_macro"] == pytest.approx(theirs, abs=1e-9)
    lost = zero_shot.accuracies(images, labels, classes, 3, [0, 0])
    both = torch.cat([labels, torch.tensor([0, 0])]), torch.cat([guessed, torch.tensor([8, 8])])
    assert lost["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(*both) * 62 / 63, abs=1e-9)
