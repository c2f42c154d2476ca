"""A decoder in DeepSpeed's hands: ZeRO-2 and ZeRO-3 train the same weights on one rank and on two, one of which sees no image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support import PROGRAMS
from support.programs.decoder import CASES, CONFIGURATIONS
from support.runs import run_ranks

pytestmark = pytest.mark.timeout(600)

Measured = dict[str, dict[str, Any]]
PAIRS = [(case, configuration) for case in CASES for configuration in CONFIGURATIONS]
EXACT = [pair for pair in PAIRS if not pair[1].endswith("bf16")]


def _measured(world: Path, folder: Path, ranks: int) -> Measured:
    """In processes of their own: this one would keep the memory and the threads of every engine."""
    run_ranks(PROGRAMS / "decoder.py", world / "tokenizer", folder, ranks=ranks, seconds=400)
    return {f"{case}_{how}": torch.load(folder / f"{case}_{how}.pt", weights_only=True) for case, how in PAIRS}


@pytest.fixture(scope="module")
def on_one(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return _measured(world, tmp_path_factory.mktemp("one_rank"), 1)


@pytest.fixture(scope="module")
def on_two(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return _measured(world, tmp_path_factory.mktemp("two_ranks"), 2)


@pytest.mark.parametrize(("case", "how"), EXACT)
def test_two_ranks_train_what_one_does(case: str, how: str, on_one: Measured, on_two: Measured) -> None:
    one, two = on_one[f"{case}_{how}"], on_two[f"{case}_{how}"]
    torch.testing.assert_close(two["norms"], one["norms"], rtol=1e-4, atol=1e-6)
    assert one["end"].keys() == two["end"].keys()
    for name, value in one["end"].items():
        torch.testing.assert_close(two["end"][name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_a_partitioned_decoder_trains_what_a_whole_one_does(case: str, on_one: Measured, on_two: Measured) -> None:
    whole = on_one[f"{case}_stage2"]
    for found in (on_one[f"{case}_stage3"], on_two[f"{case}_stage3"]):
        torch.testing.assert_close(found["norms"], whole["norms"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("case", "how"), PAIRS)
def test_what_the_answers_reach_moves_and_nothing_else_is_exported(case: str, how: str, on_one: Measured, on_two: Measured) -> None:
    for found in (on_one[f"{case}_{how}"], on_two[f"{case}_{how}"]):
        assert all(norm > 0 for norm in found["norms"])
        parts = {"decoder.projector", "decoder.language", *(["visual"] if CASES[case].get("tower") else [])}
        assert {".".join(name.split(".")[: 1 if name.startswith("visual") else 2]) for name in found["end"]} == parts
        if CASES[case]["adapt"] == "lora":
            assert all("lora" in name for name in found["end"] if "language" in name)
        still = {name for name, value in found["end"].items() if torch.equal(value, found["start"][name])}
        # the block after the one that is read, and what follows it, learn from the KD losses alone; matrices decay all the same
        assert all(name.startswith(("visual.transformer.resblocks.2", "visual.ln_post")) for name in still), still
