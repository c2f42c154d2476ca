"""The scores by hand, on embeddings small enough to check by eye."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from open_clip.transform import PreprocessCfg
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.evaluation import hard_negatives, retrieval, zero_shot
from megakd.evaluation.encoder import Encoder


def test_retrieval_of_four_pairs_by_hand() -> None:
    # similarity[i, j] of image i and text j. By rows the partner comes 1st, 2nd, 1st, 4th; by columns 2nd, 1st, 1st, 2nd.
    similarity = torch.tensor([[0.7, 0.1, 0.2, 0.0], [0.9, 0.8, 0.0, 0.1], [0.1, 0.2, 0.6, 0.3], [0.5, 0.4, 0.3, 0.2]])
    found = retrieval.recalls(similarity, torch.eye(4))
    assert found["image_to_text"] == {"R@1": 0.5, "R@5": 1.0, "R@10": 1.0}
    assert found["text_to_image"] == {"R@1": 0.5, "R@5": 1.0, "R@10": 1.0}


def test_the_cutoff_counts_candidates_before_the_partner() -> None:
    # Of 12 texts, image 0 has its partner behind exactly 4 others, image 1 behind exactly 5, the rest in front.
    similarity = torch.eye(12)
    similarity[0, 1:5] = 2
    similarity[1, 2:7] = 2
    found = retrieval.recalls(similarity, torch.eye(12))["image_to_text"]
    assert found == {cutoff: float(torch.tensor(right / 12)) for cutoff, right in {"R@1": 10, "R@5": 11, "R@10": 12}.items()}


def test_equal_embeddings_retrieve_nothing() -> None:
    same = F.normalize(torch.ones(20, 8), dim=-1)
    found = retrieval.recalls(same, same)
    assert found["image_to_text"] == found["text_to_image"] == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}


def test_a_tie_with_one_other_counts_against() -> None:
    found = retrieval.recalls(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.eye(2))
    assert found["image_to_text"]["R@1"] == 0.5


def test_queries_beyond_one_block_are_ranked_against_their_own_partners() -> None:
    rows = F.normalize(torch.randn(2500, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert retrieval.recalls(rows, rows)["image_to_text"]["R@1"] == 1.0
    shifted = retrieval.recalls(rows, rows.roll(1, dims=0))
    assert shifted["image_to_text"]["R@1"] == 0.0


def test_zero_shot_top_1_and_top_5_by_hand() -> None:
    # Seven classes; the label's class comes 1st, 3rd, 6th and 1st.
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.8, 0.7, 0.6, 0.0, 0.0, 0.0, 0.0],
            [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5],
        ]
    )
    assert zero_shot.accuracies(scores, torch.tensor([0, 2, 5, 6]), torch.eye(7)) == {
        "top1": 0.5,
        "top5": 0.75,
        "mean_per_class_recall": 0.5,
        "f1_macro": (2 / 4 + 1) / 4,
        "images": 4,
    }


def test_of_classes_with_one_name_the_lower_number_is_right_as_for_two_pairs_of_imagenets() -> None:
    assert [name for name, count in Counter(IMAGENET_CLASSNAMES).items() if count > 1] == ["missile", "sunglasses"]
    twins = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = zero_shot.accuracies(torch.tensor([[0.0, 1.0]] * 4), torch.tensor([1, 2, 1, 2]), twins)
    assert found["top1"] == 0.5
    stable = twins @ torch.tensor([0.0, 1.0])
    assert stable.sort(descending=True, stable=True).indices[0] == 1


def test_a_model_that_tells_nothing_apart_scores_what_one_guess_scores() -> None:
    found = zero_shot.accuracies(torch.ones(10, 2), torch.arange(10), torch.ones(10, 2))
    assert (found["top1"], found["top5"]) == (0.1, 0.5)


def test_top_5_of_fewer_classes_is_of_all_of_them() -> None:
    assert zero_shot.accuracies(torch.eye(3), torch.tensor([1, 1, 1]), torch.eye(3))["top5"] == 1.0


class Letters(nn.Module):
    """A text tower whose embedding counts the letters a, b, c: every expectation below can be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return tokens.float() * self.weight


def _counts(texts: list[str]) -> Tensor:
    return torch.tensor([[text.count(letter) for letter in "abc"] for text in texts])


@pytest.fixture(params=[1, 2, 100])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    tokenize: Callable[[list[str]], Tensor] = _counts
    return Encoder(Letters().eval(), PreprocessCfg(), tokenize, torch.device("cpu"), request.param)


def test_a_class_is_the_unit_mean_of_its_sentences_unit_embeddings(encoder: Encoder) -> None:
    classes = zero_shot.ClassSet(["a", "bb"], ["{c}", "{c} c", "c {c} c"])
    sentences = [["a", "a c", "c a c"], ["bb", "bb c", "c bb c"]]
    expected = torch.stack([F.normalize(_counts(own).float(), dim=-1).mean(0) for own in sentences])
    torch.testing.assert_close(zero_shot.class_embeddings(encoder, classes), F.normalize(expected, dim=-1))


def test_hard_negatives_by_hand_and_a_tie_is_a_loss(encoder: Encoder) -> None:
    images = torch.eye(3)
    captions = ["a", "b", "c"]
    negatives = [{"swap": ["b"], "count": ["aa"]}, {"swap": ["a"]}, {"swap": ["c"], "count": ["ac"]}]
    margins = hard_negatives.margins(encoder, images, captions, negatives)
    assert {kind: (margin > 0).tolist() for kind, margin in margins.items()} == {
        "swap": [True, True, False],  # the third is the caption itself
        "count": [False, True],  # "aa" points where "a" does
    }


def test_a_class_set_is_read_as_clip_benchmark_lays_it_out(world: Path) -> None:
    classes = zero_shot.read_class_set(f"{world}/zeroshot", "evaluation.zero_shot.seen")
    assert len(classes.names) == 42
    assert all("{c}" in template for template in classes.templates)


def class_set(folder: Path, names: bytes, templates: bytes = b"a {c}\n") -> zero_shot.ClassSet:
    (folder / "classnames.txt").write_bytes(names)
    (folder / "zeroshot_classification_templates.txt").write_bytes(templates)
    return zero_shot.read_class_set(str(folder), "evaluation.zero_shot.mine")


@pytest.mark.parametrize(
    "names", [b"cat\ndog", b"cat\r\ndog\r\n", b"\xef\xbb\xbfcat\ndog\n\n \n", b" cat \t\ndog", b"cat\rdog", b"cat\x0c\ndog\x0c\n"]
)
def test_class_names_are_the_lines_however_they_end(tmp_path: Path, names: bytes) -> None:
    assert class_set(tmp_path, names).names == ["cat", "dog"]


def test_class_names_may_have_braces_and_signs_of_any_language(tmp_path: Path) -> None:
    names = ["{c}", "crème brûlée", "キャット", "👩‍🔬", "a, b; c"]
    assert class_set(tmp_path, "\n".join(names).encode()).names == names


@pytest.mark.parametrize(
    ("names", "templates", "said"),
    [
        (b"", b"a {c}\n", r"classnames\.txt is empty"),
        (b"\n \n", b"a {c}\n", r"classnames\.txt is empty"),
        (b"cat\n", b"", r"templates\.txt is empty"),
        (b"cat\n\ndog\n", b"a {c}", r"line 2 of classnames\.txt is empty, and lines that follow count from it"),
        (b"caf\xe9\n", b"a {c}", r"classnames\.txt is no UTF-8 text.*iconv"),
        (b"c\0a\0t\0", b"a {c}", r"line 1 of classnames\.txt holds the control character '\\x00'"),
        (b"cat\nsea\x0clion\n", b"a {c}", r"line 2 of classnames\.txt holds the control character '\\x0c'"),
        ("sea\u2028lion".encode(), b"a {c}", r"holds the control character '\\u2028'"),
        (b"cat", b"a photo\n", r"line 1 of zeroshot_classification_templates\.txt is 'a photo': it must hold \{c\}"),
        (b"cat", b"a {c}\na {}\n", r"line 2 of .* is 'a \{\}': it must hold \{c\}.*not \{\} either"),
        (b"cat", b"a {{c}}", r"it must hold \{c\}"),
        (b"cat", b"a {c} {", r"no other braces"),
        (b"cat", b"a {C}", r"it must hold \{c\}"),
    ],
)
def test_a_damaged_class_set_is_refused_with_the_line(tmp_path: Path, names: bytes, templates: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.zero_shot\.mine.*{said}"):
        class_set(tmp_path, names, templates)


def test_a_folder_that_is_no_zero_shot_set_is_told_what_one_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no classnames\.txt there.*\.jpg and \.cls \(the class's number, from 0\)"):
        zero_shot.read_class_set(str(tmp_path), "evaluation.zero_shot.mine")
