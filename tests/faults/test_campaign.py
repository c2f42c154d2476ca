"""A part of the campaign of `make faults`, in every test run: a fixed seed and a few mutants of each family."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.campaign import BAD, Mutant, SilentFault, _attempt, families, run_family

FEW = 24


@pytest.mark.parametrize("name", families())
def test_no_mutant_ends_in_a_traceback_a_hang_or_a_silent_loss(name: str, tmp_path: Path) -> None:
    family = families()[name]
    results = list(run_family(family, min(FEW, getattr(family, "FEW", FEW)), 0, tmp_path))
    assert [(result.mutant, result.verdict, result.detail) for result in results if result.verdict in BAD] == []
    assert results


def _raising(error: BaseException) -> Mutant:
    def attempt() -> str:
        raise error

    return Mutant("raises", attempt)


def test_the_campaign_sees_each_way_to_fail() -> None:
    def endless() -> str:
        while True:
            pass

    assert _attempt(Mutant("hangs", endless), 0.2).verdict == "hang"
    assert _attempt(_raising(SilentFault("two samples less")), 5).verdict == "silent"
    assert _attempt(_raising(KeyError("step")), 5).verdict == "traceback"
    assert _attempt(_raising(ValueError("a library's")), 5).verdict == "traceback"
