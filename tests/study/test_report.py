"""`megakd report`: the page, its Markdown and its CSV say the same numbers, whatever state a study is in and whatever its names are."""

from __future__ import annotations

import csv
import html
import json
import re
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megakd.cli import app
from megakd.pages.tables import Table
from megakd.study.report.page import compose
from megakd.study.results import read_study
from support import edit_json
from support.study_folders import FAMILIES, PLAIN, RETRIEVAL, SCORES, VQA, Page, write_json, write_run, write_study

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1}{ {{ 7 * 7 }} {% raw %} |pipe| `code` [link](javascript:alert(1)) *star*",
    "half a surrogate \ud800, \u202egnirts\n\x00 and a new line",
    "long " + "x" * 5000,
    "' OR 1=1 -- &amp; &lt;",
    "]]> --> </svg></style></table>",
]


def follows(teacher: str | None, method: str, seed: int) -> float:
    """Under similarity students follow T1, T2, T3; under patch they go the other way; seeds differ a little."""
    strength = int(teacher[-1]) if teacher and teacher[-1].isdigit() else 0
    slope = {"similarity": 0.02, "patch": -0.03}.get(method, 0.0)
    return 0.5 + slope * strength + 0.001 * ((7 * seed + 3 * strength + len(method)) % 5)


def report(*arguments: Path | str) -> str:
    finished = CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False)
    assert finished.exit_code == 0, finished.output
    return finished.output


def tables_of(folder: Path) -> dict[str, Table]:
    """A study's tables by their keys, without a page and its figures, which take seconds."""
    sections = compose(read_study(folder), []).sections
    return {part.key: part for section in sections for part in section.parts if isinstance(part, Table)}


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of three teachers, two methods and none, three seeds, with its report."""
    folder = write_study(tmp_path_factory.mktemp("whole") / "study", follows)
    report(folder)
    return folder


def test_the_answer_has_its_numbers(whole: Path) -> None:
    said = compose(read_study(whole), []).answer.text
    shown = Page.read(whole / "report.html").shown
    for text in (said, " ".join(shown.split())):
        assert "under similarity, VQA of students and teachers has a Spearman correlation of 1.00" in text.replace("Under", "under")
        assert "3 teachers, 9 students" in text
        assert "patch it is −1.00" in text
    assert "Yes, for these 3 teachers; they are too few to speak of others" in said


def test_the_page_has_every_row_of_the_csv_with_the_same_numbers(whole: Path) -> None:
    head, *shown = Page.read(whole / "report.html").tables["rows"]
    rows = rows_of(whole)
    assert [row["id"] for row in rows] == [cells[0].text for cells in shown]
    assert len(rows) == 21 + 3
    for row, cells in zip(rows, shown, strict=True):
        by_title = dict(zip((cell.text for cell in head), cells, strict=True))
        for axis in ("teacher", "student", "method", "steps", "data", "seed", "status"):
            assert by_title[axis].text == (row[axis] or "–")
        for title, path in (("VQA", VQA), ("retrieval", RETRIEVAL)):
            assert by_title[title].value == row[path]
            assert by_title[title].text == f"{100 * float(row[path]):.1f}"


def test_means_spreads_and_gains_of_the_page_are_those_of_the_csv(whole: Path) -> None:
    every_row = rows_of(whole)
    rows = [row for row in every_row if row["kind"] == "cell"]
    page = Page.read(whole / "report.html")
    head, *shown = page.tables["methods"]
    titles = [cell.text for cell in head]
    assert titles == ["method", "cells", "VQA", "over none, points", "retrieval"]
    plain = [float(row[VQA]) for row in rows if row["method"] == PLAIN]
    for cells in shown:
        method = cells[0].text
        for path, column in ((VQA, 2), (RETRIEVAL, 4)):
            by_seed = [
                statistics.fmean(float(row[path]) for row in rows if (row["method"], row["seed"]) == (method, str(seed)))
                for seed in range(3)
            ]
            assert float(cells[column].value or "") == pytest.approx(statistics.fmean(by_seed), abs=1e-12)
            assert f"± {100 * statistics.stdev(by_seed):.1f}" in cells[column].text
            if path == VQA and method != PLAIN:
                gain = statistics.fmean(one - other for one, other in zip(by_seed, plain, strict=True))
                assert float(cells[3].value or "") == pytest.approx(gain, abs=1e-12)
    head, *shown = page.tables["families"]
    assert [cell.text for cell in head] == ["method", *FAMILIES]
    assert [cells[0].text for cells in shown] == [PLAIN, "similarity", "patch", "teacher T1", "teacher T2", "teacher T3"]
    for cells in shown:
        rows_of_it = [row for row in every_row if cells[0].text in (row["method"], row["id"])]
        for name, cell in zip(FAMILIES, cells[1:], strict=True):
            values = [float(row[f"vqa/test/by_family/{name}/accuracy"]) for row in rows_of_it]
            assert float(cell.value or "") == pytest.approx(statistics.fmean(values), abs=1e-12)


def _markdown_tables(text: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        lines = [line for line in block.strip().split("\n") if not re.fullmatch(r"\|[-:|]+\|", line)]
        found.append([[_plain(cell) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines])
    return found


def _plain(cell: str) -> str:
    cell = re.sub(r"(?<!\\)\*\*", "", cell)
    return " ".join(html.unescape(re.sub(r"\\(.)", r"\1", cell)).split())


@pytest.mark.parametrize("names", ["plain", "hostile"])
def test_the_markdown_has_the_pages_tables(names: str, whole: Path, tmp_path: Path) -> None:
    folder = whole
    if names == "hostile":
        folder = write_study(tmp_path / "study", follows, methods=HOSTILE[:3], teachers=HOSTILE[3:6], seeds=2)
        report(folder)
    tables = _markdown_tables((folder / "report.md").read_text(encoding="utf-8"))
    shown = [[[" ".join(cell.text.split()) for cell in row] for row in rows] for rows in Page.read(folder / "report.html").tables.values()]
    # a mark is set off by a space in one of them
    assert [[[re.sub(" ([▲▼])", r"\1", cell) for cell in row] for row in rows] for rows in tables] == shown


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    more = {"title": HOSTILE[0], "question": HOSTILE[1], "command": HOSTILE[2], "data": {HOSTILE[1]: HOSTILE[0]}, "commit": HOSTILE[6]}
    more["hypotheses"] = [
        {"name": name, "prediction": name, "measure": name, "threshold": 0.1, "verdict": {"holds": None, name: name}} for name in HOSTILE
    ]
    folder = write_study(
        tmp_path / "study", follows, methods=HOSTILE, teachers=[f"{name} {place}" for place, name in enumerate(HOSTILE)], seeds=2,
        more=more,
        status=lambda teacher, method, seed: ("failed", HOSTILE[seed]) if method == HOSTILE[6] else ("done", ""),
    )  # fmt: skip
    report(folder)
    text, page = (folder / "report.html").read_text(encoding="utf-8"), Page.read(folder / "report.html")
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert "<script>alert" not in text.replace("aria-label", "")
    assert HOSTILE[0] in page.shown
    assert HOSTILE[1] in page.shown
    assert "{{ 7 * 7 }} {% raw %}" in page.shown
    assert page.shown.count("x" * 5000) > 1
    for picture in (folder / "figures").glob("*.svg"):
        ElementTree.parse(picture)
    for svg in re.findall(r"<svg .*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    for line in (folder / "report.md").read_text(encoding="utf-8").splitlines():
        assert not re.search(r"(?<!\\)<(script|img)", line)


def test_the_page_is_one_file_that_may_load_nothing(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)=["'](?!#)""", text)
    assert "url(" not in text.replace("url(#", "")
    assert len(text.encode()) < 3_000_000
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert sorted(ids) == sorted(set(ids))


def test_every_figure_is_in_the_page_and_a_file_of_each_kind(whole: Path) -> None:
    page, files = Page.read(whole / "report.html"), sorted(path.name for path in (whole / "figures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in page.figures for kind in ("svg", "png"))
    # curves by score, a heat map, a loss and two scores by step
    assert {"methods_0", "teachers_0_0", "teachers_0_1", "heat_0", "learning_0_0", "learning_0_1", "learning_0_2"} == set(page.figures)


def test_a_report_is_the_same_when_it_is_made_again_and_says_its_answer_and_place(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.suffix != ".png"}
    assert report(whole) == f"{compose(read_study(whole), []).answer.text}\n{whole / 'report.html'}\n"
    assert {path: path.read_bytes() for path in before} == before


def test_figures_of_an_earlier_report_go_and_files_of_others_stay(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", follows, seeds=1)
    report(folder)
    content = folder / "study.json"
    assert (folder / "figures" / "heat_0.svg").exists()
    write_json(content, {"format": 1, "cells": []})
    report(folder)
    assert list((folder / "figures").iterdir()) == []
    (folder / "figures" / "mine.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"figures holds files that no report wrote \(mine.png\); choose another --out"):
        report(folder)


def test_a_method_that_makes_students_follow_their_teachers_is_named_and_so_is_that_there_is_none(tmp_path: Path) -> None:
    def falls(teacher: str | None, method: str, seed: int) -> float:
        return follows(teacher, {"similarity": "patch", "patch": "similarity"}.get(method, method), seed)

    escapes, none = (write_study(tmp_path / name, score) for name, score in (("escapes", falls), ("none", follows)))
    rule = "by this rule: a Spearman in VQA above 0.8, and its difference from that of similarity above 0 with the whole interval"
    for folder, said in (
        (escapes, "Stronger teachers make better students under patch"),
        (none, "Of 1 other method none makes students follow"),
    ):
        [text] = next(section for section in compose(read_study(folder), []).sections if section.key == "teachers").texts
        assert text.startswith(said)
        assert rule in text


def test_methods_are_compared_over_the_teachers_that_all_of_them_have(tmp_path: Path) -> None:
    def absent(teacher: str | None, method: str, seed: int) -> tuple[str, str]:
        return ("absent" if (teacher, method) == ("T3", "patch") else "done", "")

    folder = write_study(tmp_path / "study", follows, status=absent)
    methods = tables_of(folder)["methods"]
    assert "Only over teachers that all methods have; T3: by teacher below." in methods.caption
    similarity = next(row for row in methods.rows if row[0].text == "similarity")
    assert similarity[1].text == "6 of 6"
    seeds = [statistics.fmean(follows(teacher, "similarity", seed) for teacher in ("T1", "T2")) for seed in range(3)]
    assert similarity[2].value == pytest.approx(statistics.fmean(seeds), abs=1e-12)
    assert [row[1].text for row in tables_of(folder)["combinations"].rows if row[0].text == "similarity"] == ["T1", "T2", "T3"]


def test_orders_are_of_the_teachers_that_all_methods_have_where_these_are_three_or_more(tmp_path: Path) -> None:
    def absent(teacher: str | None, method: str, seed: int) -> tuple[str, str]:
        return ("absent" if (teacher, method) == ("T4", "patch") or (teacher == "T4" and seed) else "done", "")

    teachers = ("T1", "T2", "T3", "T4")
    folder = write_study(tmp_path / "study", follows, teachers=teachers, status=absent)
    following = {row[0].text: [cell.text for cell in row] for row in tables_of(folder)["following"].rows if row[1].text == "VQA"}
    assert following["similarity"][2] == following["patch"][2] == "3 (9)"
    assert "(" in following["similarity"][3]  # T4's one seed would leave no interval


def test_significant_differences_are_marked_after_holms_correction_over_the_table(tmp_path: Path) -> None:
    """Ten seeds: one method is clearly above none, one clearly below, and one by so little that it is so alone (p = 0.04), not of six."""
    gain = {PLAIN: 0.0, "better": 0.1, "slight": 0.0035, "worse": -0.1}
    folder = write_study(
        tmp_path / "study", lambda teacher, method, seed: 0.5 + gain[method] + 0.01 * ((seed * 7 + len(method) * 3) % 11) / 11,
        methods=("better", "slight", "worse"), teachers=("T1",), seeds=10,
    )  # fmt: skip
    marks = {cells[0].text: "".join(cell.mark for cell in cells) for cells in tables_of(folder)["methods"].rows}
    assert marks == {PLAIN: "", "better": "▲▲", "slight": "", "worse": "▼▼"}


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_little_data_is_said_plainly(seeds: int, tmp_path: Path) -> None:
    def said(*teachers: str) -> str:
        return compose(read_study(write_study(tmp_path / str(len(teachers)), follows, teachers=teachers, seeds=seeds)), []).answer.text

    assert "Too little data: how students follow their teachers in VQA cannot be said: 2 teachers: a rank correlation needs 3" in said(
        "T1", "T2"
    )
    three, one = said("T1", "T2", "T3"), said("T1")
    assert three.startswith("Too little data" if seeds == 1 else "Yes")
    assert "one seed of T1, T2, T3: an interval needs two of each teacher" in three or seeds == 2
    assert "under similarity there are students of 1 teacher" in one
    assert "The highest mean is that of similarity: 52." in one


@pytest.mark.parametrize(
    ("gain", "spread", "seeds", "verdict", "said"),
    [
        (0.1, 0.02, 5, "Yes", "The highest mean is that of similarity: 60.0% of 5 seeds, +9.0 points over none"),
        (-0.1, 0.02, 5, "No, the reverse", "The highest mean is that of none: 51.0% of 5 seeds."),
        (0.001, 0.05, 5, "Undecided", "No gain over none is significant at 5% after Holm's correction over the table of methods."),
        (0.1, 0.02, 1, "Too little data", "One difference: an interval needs two."),
    ],
)  # fmt: skip
def test_whether_students_gain_is_answered_where_that_is_asked(
    gain: float, spread: float, seeds: int, verdict: str, said: str, tmp_path: Path
) -> None:
    def score(teacher: str | None, _: str, seed: int) -> float:
        return 0.5 + (gain + spread * (seed % 2 - 0.4 * (seeds > 1)) if teacher else 0.005 * seed)

    folder = write_study(tmp_path / "study", score, teachers=["T"], methods=["similarity"], seeds=seeds, more={"asks": "gain"})
    found = compose(read_study(folder), []).answer
    assert found.verdict == verdict, found.text
    assert said in found.text
    write_json(folder / "study.json", {**json.loads((folder / "study.json").read_text()), "plain_method": None})
    assert "Too little data: no seed has a finished cell with a teacher and one of" in compose(read_study(folder), []).answer.text


def test_diagnostics_are_held_against_the_score_best_predictor_first(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", follows)
    for place, path in enumerate(sorted((folder / "cells").glob("*/evaluation.json"))):
        content = json.loads(path.read_text(encoding="utf-8"))
        vqa = content["vqa"]["test"]["accuracy"]
        write_json(path, {**content, "diagnostics": {"test": {"cka_image": 2 * vqa + 1, "noise": (place * 7) % 11 / 11}}})
    first, second = tables_of(folder)["predictions"].rows
    assert [cell.text for cell in first] == ["test/cka_image", "1.00", "1.00", "0.0", "18", "3"]
    assert second[0].text == "test/noise"
    assert isinstance(second[1].value, float)
    assert second[1].value < 0.5
    assert {"diagnostic_0", "diagnostic_1"} < {figure.key for figure in compose(read_study(folder), []).figures()}


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", follows, seeds=1)
    edit_json(folder / "cells/1_0/evaluation.json", sets="0dd")
    edit_json(folder / "study.json", scores=SCORES * 5)
    edit_json(folder / "study.json", lambda study: [cell["axes"].update(steps=str(place)) for place, cell in enumerate(study["cells"])])
    section = compose(read_study(folder), []).sections[0]
    assert section.texts[0].startswith("The cells were scored on 2 different evaluation sets")
    assert "Figures are of the first 6 of 7 students, steps and data" in section.texts[0]
    assert "Curves are of the first 8 of 10 scores" in section.texts[0]


def test_a_study_without_a_finished_cell_has_a_page(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", follows, status=lambda *_: ("missing", ""))
    assert "No answer yet: 0 of 21 cells are finished" in report(folder)
    write_json(folder / "study.json", {"format": 1})
    assert "No answer yet: 0 of 0 cells" in report(folder)
    assert "rows" not in Page.read(folder / "report.html").tables


def test_a_study_under_way_has_its_finished_cells_and_the_last_words_of_the_others(tmp_path: Path) -> None:
    def status(teacher: str | None, method: str, seed: int) -> tuple[str, str]:
        if method == "patch" and seed == 1:
            return "failed", "line one\nerror: loss is nan"
        return ("running", "") if teacher == "T3" and seed == 2 else ("done", "")

    folder = write_study(tmp_path / "study", follows, status=status)
    tables = tables_of(folder)
    troubles = tables["troubles"].rows
    assert sum(cells[3].text == "line one\nerror: loss is nan" for cells in troubles) == 3
    assert sum(cells[2].text == "running" for cells in troubles) == 2
    cells_of = {cells[0].text: cells[1].text for cells in tables["methods"].rows}
    assert cells_of == {PLAIN: "3 of 3", "similarity": "8 of 9", "patch": "5 of 9"}
    # seed 2 of similarity lacks a teacher, and counts in no mean over all three
    similarity = next(cells for cells in tables["methods"].rows if cells[0].text == "similarity")
    seeds = [statistics.fmean(follows(f"T{number}", "similarity", seed) for number in (1, 2, 3)) for seed in (0, 1)]
    assert similarity[2].value == pytest.approx(statistics.fmean(seeds), abs=1e-12)


def test_runs_without_a_study_and_a_single_run_have_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        write_run(Path(f"runs/plain{seed}"), 0.4 + seed / 10, 0.2, seed=seed)
    Path("runs/notes.txt").write_text("", encoding="utf-8")
    said = report(*sorted(Path("runs").iterdir()))
    assert said.endswith("report/report.html\n")
    rows = rows_of(Path("report"))
    assert [(row["id"], row["method"], row["seed"], row["status"]) for row in rows] == [
        ("plain0", "no KD", "0", "done"), ("plain1", "no KD", "1", "done"),
    ]  # fmt: skip
    assert "1 paths are files" in Path("report/report.md").read_text(encoding="utf-8")
    report("runs/plain1", "runs/notes.txt", "--out", "one")  # alone it has a page of its own, see tests/pages
    assert [row[VQA] for row in rows_of(Path("one"))] == ["0.5"]
    assert Page.read(Path("one/report.html")).shown.count("plain1") >= 2
    report("runs", "--out", "below")  # the run folders in it
    assert len(rows_of(Path("below"))) == 2


def test_what_is_no_study_and_no_run_is_one_message(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "no", "is not there"), (tmp_path, "neither a study")):
        with pytest.raises(ValueError, match=message):
            report(path)
    (tmp_path / "study.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"study.json: cannot be read"):
        report(tmp_path)
    write_json(tmp_path / "study.json", {"format": 2})
    with pytest.raises(ValueError, match="format 2, where this megakd reads 1"):
        report(tmp_path)
