"""What a row's run folders say of how its numbers came about."""

from __future__ import annotations

from megakd.pages.records import Record, record_of
from megakd.runtime.run_folder import RUN
from megakd.study.results import Row


def records_of(row: Row) -> list[Record]:
    """The student's run, then its readout's; empty for a row whose runs left nothing. Of a readout alone the first says nothing."""
    if row.readout == row.folder:
        return [Record(), record_of(row.folder)] if (row.folder / RUN).exists() else []
    return [record_of(folder) for folder in (row.folder, row.readout) if folder is not None and (folder / RUN).exists()]
