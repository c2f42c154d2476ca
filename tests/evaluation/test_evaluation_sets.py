"""Sets as people have them: several captions an image, samples that cannot be read, numbers that are none, on a model that reads all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support import PROGRAMS
from support.numbered_pictures import Reader, captioned, picture, recipe, results, scores
from support.runs import run_ranks
from support.shards import write_tar

PERFECT = {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0}


def retrieval(members: list[tuple[str, bytes]], folder: Path, model: Reader | None = None, max_bad_fraction: float = 0.01) -> Any:
    write_tar(folder / "set" / "0.tar", members)
    return results(recipe(max_bad_fraction, retrieval={"mine": f"{folder}/set/*.tar"}), model)["retrieval"]["mine"]


def test_each_line_of_a_text_is_a_caption_of_its_image(tmp_path: Path) -> None:
    captions = [[f"{number} {word}" for word in "abc"[: 1 + number % 3]] for number in range(20)]
    found = retrieval([member for number in range(20) for member in captioned(number, captions[number])], tmp_path)
    assert found["image_to_text"] == found["text_to_image"] == PERFECT
    assert (found["images"], found["pairs"]) == (20, 39)
    assert (found["repeated_captions"], found["repeated_images"], found["blank_captions"], found["unreadable"]) == (0, 0, 0, 0)


def test_five_rows_of_one_image_are_one_image_with_five_captions(tmp_path: Path) -> None:
    members = []
    for number in range(12):
        for row in range(5):
            # the same picture, whatever its file says beside it
            image = picture(number, compress_level=row)
            members += [(f"{number}_{row}.png", image), (f"{number}_{row}.txt", f"{number} in other words, {row}".encode())]
    found = retrieval(members, tmp_path)
    assert found["image_to_text"] == found["text_to_image"] == PERFECT
    assert (found["images"], found["pairs"], found["repeated_images"]) == (12, 60, 48)


def test_one_right_caption_of_several_is_enough_for_an_image_and_each_caption_counts_for_itself(tmp_path: Path) -> None:
    members = [member for number in range(1, 11) for member in captioned(number, [f"{number} right", "0 wrong", "0 wrong, too"])]
    found = retrieval([*members, *captioned(0, ["0"])], tmp_path)
    # picture 0 has its own caption, and twenty others that are as near
    assert found["image_to_text"]["R@1"] == pytest.approx(10 / 11)
    assert found["text_to_image"]["R@1"] == pytest.approx(11 / 31)


def test_repeated_captions_are_counted_and_a_tie_is_a_miss(tmp_path: Path) -> None:
    members = [member for number in range(10) for member in captioned(number)]
    members += [("again.png", picture(99)), ("again.txt", b"3 as it is")]
    found = retrieval(members, tmp_path)
    assert (found["repeated_captions"], found["ties"]) == (1, "a miss")
    assert found["image_to_text"]["R@1"] == pytest.approx(9 / 11)  # 3 ties with the caption of 99, and 99 is misnamed
    assert found["text_to_image"]["R@1"] == pytest.approx(10 / 11)


def test_a_model_that_sees_nothing_retrieves_nothing(tmp_path: Path) -> None:
    found = retrieval([member for number in range(20) for member in captioned(number)], tmp_path, Reader(blind=True))
    assert found["text_to_image"] == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}


def broken(number: int) -> list[tuple[str, bytes]]:
    return [(f"{number:04d}.png", picture(number)[:40]), (f"{number:04d}.txt", f"{number} a\n{number} b".encode())]


def test_what_cannot_be_read_is_wrong_in_both_directions(tmp_path: Path) -> None:
    members = [member for number in range(16) for member in captioned(number)]
    members += [*broken(16), *broken(17), ("no.png", picture(18)), ("bytes.png", picture(19)), ("bytes.txt", b"\xff\xfe")]
    found = retrieval(members, tmp_path, max_bad_fraction=0.5)
    assert found["unreadable"] == 4
    assert (found["images"], found["pairs"]) == (20, 16 + 2 + 2 + 1 + 1)
    assert found["image_to_text"]["R@10"] == pytest.approx(16 / 20)
    assert found["text_to_image"]["R@10"] == pytest.approx(16 / 22)


def test_a_bad_text_of_an_image_that_other_rows_show_costs_a_caption_and_no_image(tmp_path: Path) -> None:
    members = [*captioned(1), ("again.png", picture(1)), ("again.txt", b"\xff"), *captioned(2)]
    found = retrieval(members, tmp_path, max_bad_fraction=0.5)
    assert (found["images"], found["pairs"], found["unreadable"]) == (2, 3, 1)
    assert found["image_to_text"]["R@1"] == 1.0
    assert found["text_to_image"]["R@1"] == pytest.approx(2 / 3)


def test_39_broken_samples_of_40_are_an_error_before_training_and_no_score(tmp_path: Path) -> None:
    members = [*captioned(0), *(member for number in range(1, 40) for member in broken(number))]
    with pytest.raises(ValueError, match=r"evaluation\.retrieval\.mine: 39 of 40 samples are unusable.*corrupt_image 39.*max_bad_fraction"):
        retrieval(members, tmp_path)
    first = [*(member for number in range(1, 40) for member in broken(number)), *captioned(40)]
    with pytest.raises(ValueError, match=r"evaluation\.retrieval\.mine: 16 of 40 samples are unusable"):
        retrieval(first, tmp_path / "first")


def test_an_embedding_that_is_not_a_number_is_an_error_and_no_score(tmp_path: Path) -> None:
    members = [member for number in range(20) for member in captioned(number)]
    with pytest.raises(ValueError, match=r"evaluation\.retrieval\.mine: image embeddings are not finite, 1 of 20"):
        retrieval(members, tmp_path, Reader(broken=7))


def zero_shot(folder: Path, numbers: list[int], names: list[str], model: Reader | None = None, bad: int = 0, max_bad: float = 0.01) -> Any:
    (folder / "classnames.txt").write_text("\n".join(names))
    (folder / "zeroshot_classification_templates.txt").write_text("{c} it is\n{c}\n")
    samples = [(f"{row:04d}", picture(number), b"%d\n" % number) for row, number in enumerate(numbers)]
    samples += [(f"bad{row}", b"none", b"0") for row in range(bad)]
    members = [(f"{key}.{kind}", data) for key, image, label in samples for kind, data in (("png", image), ("cls", label))]
    write_tar(folder / "test" / "0.tar", members)
    return results(recipe(max_bad, zero_shot={"mine": str(folder)}), model)["zero_shot"]["mine"]


def test_zero_shot_counts_what_cannot_be_read_as_wrong(tmp_path: Path) -> None:
    found = zero_shot(tmp_path, [0, 1, 2, 3, 4, 5], [str(name) for name in range(6)], bad=2, max_bad=0.5)
    assert (found["top1"], found["top5"], found["images"], found["unreadable"]) == (0.75, 0.75, 8, 2)
    with pytest.raises(ValueError, match=r"evaluation\.zero_shot\.mine: 2 of 8 samples are unusable"):
        zero_shot(tmp_path, [0, 1, 2, 3, 4, 5], [str(name) for name in range(6)], bad=2)


def test_classes_of_one_name_are_counted_and_the_lower_number_is_right(tmp_path: Path) -> None:
    found = zero_shot(tmp_path, [0, 1, 2, 3, 4, 5], ["0", "1", "2", "2", "4", "5"])
    assert found["repeated_classes"] == 1
    assert found["top1"] == pytest.approx(5 / 6)


def test_zero_shot_of_a_broken_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.zero_shot\.mine: image embeddings are not finite, 2 of 4"):
        zero_shot(tmp_path, [0, 1, 1, 2], ["0", "1", "2"], Reader(broken=1))


def test_a_label_beyond_the_class_names_is_found_at_the_start_or_named_later(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.tar: 0000: its label \(\.cls\) is 3; labels must be numbers from 0 to 2"):
        zero_shot(tmp_path, [3, 0, 1], ["0", "1", "2"])
    with pytest.raises(ValueError, match=r"0\.tar: 0002: its label \(\.cls\) is 7"):
        zero_shot(tmp_path, [0, 1, 7], ["0", "1", "2"])


def negatives(folder: Path, samples: list[tuple[bytes, bytes]], model: Reader | None = None, max_bad: float = 0.01) -> Any:
    members = [
        member
        for row, (image, more) in enumerate(samples)
        for member in ((f"{row}.png", image), (f"{row}.txt", b"%d true" % row), (f"{row}.json", more))
    ]
    write_tar(folder / "0.tar", members)
    return results(recipe(max_bad, hard_negatives={"mine": f"{folder}/*.tar"}), model)["hard_negatives"]["mine"]


def false(**kinds: Any) -> bytes:
    return json.dumps({"negatives": kinds}).encode()


def test_hard_negatives_of_what_cannot_be_read_are_lost(tmp_path: Path) -> None:
    samples = [(picture(row), false(swap="99", other="98") if row % 2 else false(swap="99")) for row in range(6)]
    samples += [(b"", false(swap="99")), (b"damaged", false(other="98"))]
    found = negatives(tmp_path, samples, max_bad=0.5)
    assert found == {"other": {"accuracy": 3 / 4, "pairs": 4, "unreadable": 1}, "swap": {"accuracy": 6 / 7, "pairs": 7, "unreadable": 1}}


def test_a_negative_that_is_the_caption_cannot_be_told_from_it_and_is_counted(tmp_path: Path) -> None:
    found = negatives(tmp_path, [(picture(0), false(swap="0 true ")), (picture(1), false(swap="5"))])
    assert found == {"swap": {"accuracy": 0.5, "pairs": 2, "unreadable": 0, "same_as_caption": 1}}


def test_a_caption_has_to_be_nearer_than_each_of_several_negatives_of_a_kind(tmp_path: Path) -> None:
    samples = [(picture(0), false(order=["7", "9"])), (picture(1), false(order=["9", "1 again"])), (picture(2), false(order="5"))]
    found = negatives(tmp_path, samples)
    assert found == {"order": {"accuracy": 2 / 3, "pairs": 3, "unreadable": 0}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"negatives": ["a", "b"]}', "its negatives are a list"),
        (b'{"negatives": "a"}', "its negatives are a str"),
        (b'{"negatives": {"swap": ["a", 1]}}', r"its negative 'swap' holds a int.*a text or a list of some for each kind"),
        (b'{"negatives": {"swap": []}}', "its negative 'swap' holds an empty list"),
        (b'{"negatives": {"swap": ""}}', "its negative 'swap' holds no text"),
        (b'{"negatives": {"swap": null}}', "its negative 'swap' holds a NoneType"),
        (b"[" * 100_000, r"its \.json member cannot be read"),
        (b"\xff\xfe{}", r"its \.json member cannot be read"),
    ],
)
@pytest.mark.parametrize("row", [0, 3])
def test_negatives_of_another_form_are_refused_with_the_form(tmp_path: Path, content: bytes, said: str, row: int) -> None:
    samples = [(picture(number), content if number == row else false(swap="99")) for number in range(4)]
    with pytest.raises(ValueError, match=rf"0\.tar: {row}: {said}"):
        negatives(tmp_path, samples)


def test_hard_negatives_of_a_broken_model_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hard_negatives\.mine, swap: similarity"):
        negatives(tmp_path, [(picture(row), false(swap="99")) for row in range(4)], Reader(broken=2))


def ranks(pattern: str, broken_number: str) -> list[str]:
    """What two ranks say."""
    wanted = json.dumps({"retrieval": {"mine": pattern}})
    return [said.strip() for said in run_ranks(PROGRAMS / "numbered_sets.py", wanted, broken_number)]


def test_two_ranks_find_what_one_finds_and_fail_together(tmp_path: Path) -> None:
    good = [member for number in range(23) for member in captioned(number, [f"{number} a", f"{number} b", f"{number % 5} c"])]
    write_tar(tmp_path / "good" / "0.tar", [*good, *captioned(40)])
    alone = scores(recipe(retrieval={"mine": f"{tmp_path}/good/*.tar"}))
    assert ranks(f"{tmp_path}/good/*.tar", "") == [f"FOUND {alone}"] * 2
    first, second = ranks(f"{tmp_path}/good/*.tar", "40")  # on the second rank alone
    assert first == second == first.replace("FOUND", "ERROR")
    assert "image embeddings are not finite, 1 of 24" in first
