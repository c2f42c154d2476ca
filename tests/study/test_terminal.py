"""What `megakd smoke` prints at its end: the report's own tables, and each gain by its values."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.study.report import appendix, tables, terminal
from megakd.study.report.records import records_of
from megakd.study.report.summary import Summary
from megakd.study.results import read_study
from support import edit_json
from support.study_folders import PLAIN, write_run, write_study

GAINS = {"better": (0.2, 0.1, 0.15), "worse": (-0.1, -0.1, -0.13)}


def score(teacher: str | None, method: str, seed: int) -> float:
    return 0.5 + GAINS.get(method, (0.0, 0.0, 0.0))[seed] if teacher else 0.5


def study(folder: Path, seeds: int) -> Path:
    return write_study(folder / "study", score, methods=list(GAINS), teachers=["T"], seeds=seeds)


def test_the_printed_tables_are_the_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = read_study(study(tmp_path, 3))
    terminal.show(results)
    said = capsys.readouterr().out
    summary, records = Summary(results), {row.id: records_of(row) for row in results.rows}
    for of in (tables.methods(summary), tables.references(summary), tables.families(summary), appendix.cost(summary, records)):
        assert of is not None
        own = said[said.index(of.title) :]
        assert of.caption in own
        assert all(column.title in own for column in of.columns)
        lines = [[part.strip() for part in line.split("│")[1:-1]] for line in own.splitlines() if line.startswith("│")]
        for row in of.rows:
            shown = [f"{cell.text}{f' ± {cell.spread}' if cell.spread else ''}{f' {cell.mark}' if cell.mark else ''}" for cell in row]
            assert shown in lines


def test_gains_are_said_by_their_values(tmp_path: Path) -> None:
    said = list(terminal.gains(Summary(read_study(study(tmp_path / "3", 3)))))
    assert [line.partition(":")[0] for line in said] == [
        f"{method} over {PLAIN}, {title}" for method in GAINS for title in ("VQA", "retrieval")
    ]
    assert said[0] == f"better over {PLAIN}, VQA: +15.0 points (95% interval +2.6 to +27.4); by seed +20.0, +10.0, +15.0"
    assert said[2].endswith("; by seed −10.0, −10.0, −13.0")
    assert next(terminal.gains(Summary(read_study(study(tmp_path / "1", 1))))) == f"better over {PLAIN}, VQA: +20.0 points"


def test_gains_of_several_settings_say_which(tmp_path: Path) -> None:
    folder = study(tmp_path, 2)
    seeds = 0, 1  # the second seed's cells become another length of training
    edit_json(folder / "study.json", lambda found: [cell["axes"].update(steps=str(cell["axes"]["seed"])) for cell in found["cells"]])
    said = list(terminal.gains(Summary(read_study(folder))))
    assert [line for line in said if line.startswith("better") and "VQA" in line] == [
        f"better over {PLAIN} (steps {seed}), VQA: +{gain}.0 points" for seed, gain in zip(seeds, (20, 10), strict=True)
    ]


def test_the_cost_of_a_readout_is_no_training_of_a_tower(tmp_path: Path) -> None:
    """A teacher whose tower is read with two seeds, and a decoder without a tower."""
    folder = study(tmp_path, 1)
    for name in ("read_0", "read_1", "blind"):
        write_run(folder / name, 0.5, None)
    (folder / "teachers/0/evaluation.json").unlink()
    controls = [{"name": f"teacher T's tower, seed {seed}", "folders": {"readout": f"read_{seed}"}, "status": "done"} for seed in (0, 1)]
    controls.append({"name": "blind decoder, seed 0", "folder": "blind", "folders": {"readout": "blind"}, "status": "done"})
    teacher = {"name": "T", "folder": "teachers/0", "folders": {}, "status": "done"}
    edit_json(folder / "study.json", teachers=[teacher], controls=controls)
    results = read_study(folder)
    summary = Summary(results)
    cost = appendix.cost(summary, {row.id: records_of(row) for row in results.rows})
    assert cost is not None
    assert {row[0].text: [cell.text for cell in row[2:6]] for row in cost.rows if row[1].text == "–"} == {
        "teacher T": ["3", "16 s", "16 s", "100"],
        "blind decoder": ["1", "–", "16 s", "–"],
    }
    commands = appendix.reproduction(results, {row.id: records_of(row) for row in results.rows})
    assert commands is not None
    assert [cells[-1].text for cells in commands.rows if cells[0].text == "blind"] == ["5e75"]
    own = tables.references(summary)
    assert own is not None
    assert [[cell.text for cell in row[:4]] for row in own.rows] == [
        ["teacher T", "3", "1,234,567", "50.0"],
        ["blind decoder", "1", "1,234,567", "50.0"],
    ]


def test_the_page_is_made_beside_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = study(tmp_path, 2)
    terminal.conclude(folder)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "report.html")
    assert (folder / "report.html").is_file()
    assert (folder / "results.csv").is_file()
    (folder / "figures" / "mine.png").write_bytes(b"")
    with pytest.raises(ValueError, match="figures holds files that no report wrote"):
        terminal.conclude(folder)
