"""The benchmarks' rules, against values worked out by hand from their definitions and oddities."""

from __future__ import annotations

from typing import Any

import pytest

from megakd.vqa.benchmarks import benchmark
from megakd.vqa.benchmarks.base import Answered, Question
from megakd.vqa.benchmarks.pope import pope_says_yes
from megakd.vqa.benchmarks.scienceqa import scienceqa_letter
from megakd.vqa.benchmarks.textvqa import textvqa_accuracy
from megakd.vqa.benchmarks.vizwiz import vizwiz_accuracy
from megakd.vqa.normalise import CONTRACTIONS, NUMBER_WORDS, normalised, textvqa_normalised, trimmed, vizwiz_normalised
from megakd.vqa.scores import vqa_accuracy


def score(name: str, answered: list[Answered]) -> dict[str, Any]:
    return benchmark(name).results(answered)


def question(answers: tuple[str, ...], family: str = "", image: str | None = "a.jpg", **meta: Any) -> Question:
    return Question(1, image, "what?", answers, answers[0] if answers else "", family, meta)


def ten(matches: int, answer: str = "red") -> tuple[str, ...]:
    """Ten answers, `matches` of them `answer`, the others all different."""
    return (answer,) * matches + tuple(f"other {letter}" for letter in "bcdefghijk"[: 10 - matches])


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), *((more, 1.0) for more in range(4, 11))])
def test_accuracy_is_the_mean_over_the_ten_leave_one_out_subsets(matches: int, expected: float) -> None:
    # n of 10 agree: n subsets leave one of them out and keep n - 1, the other 10 - n keep n; min(1, kept / 3)
    for accuracy in (vqa_accuracy, textvqa_accuracy, vizwiz_accuracy):
        assert accuracy("red", ten(matches)) == pytest.approx(expected)


def test_unanimous_answers_are_compared_as_they_are() -> None:
    same = ("yes",) * 10
    assert vqa_accuracy("yes", same) == 1.0
    assert vqa_accuracy(" yes\n", same) == 1.0  # white space is always trimmed
    for said in ("Yes", "yes.", "the yes"):
        assert vqa_accuracy(said, same) == 0.0
        assert vqa_accuracy(said, ("yes",) * 9 + ("no",)) == 1.0
    assert vqa_accuracy("Two", ("Two",) * 10) == 1.0
    assert vqa_accuracy("2", ("Two",) * 10) == 0.0
    assert textvqa_accuracy("Yes", same) == 1.0  # TextVQA always processes


def test_answers_that_differ_in_spelling_alone_count_as_different_before_and_as_equal_after_processing() -> None:
    assert vqa_accuracy("2", ("two",) * 5 + ("2",) * 5) == 1.0
    assert vqa_accuracy("TWO.", ("two",) * 9 + ("2",)) == 1.0


def test_a_line_break_or_tab_inside_an_answer_is_a_space() -> None:
    assert trimmed("\tred\nball \n") == "red ball"
    assert vqa_accuracy("red\nball", ("red\tball",) * 10) == 1.0


def test_vizwiz_never_processes_the_peoples_answers_and_always_the_prediction() -> None:
    assert vizwiz_accuracy("Yes.", ("yes",) * 10) == 1.0
    assert vizwiz_accuracy("yes", ("Yes",) * 9 + ("no",)) == 0.0
    assert vizwiz_accuracy("Yes", ("Yes",) * 9 + ("no",)) == 0.0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Dont know.", "don’t know"),
        ("don't know", "don't know"),  # already spelled: nothing is done
        ("cant", "can't"),  # eight words gain a straight one
        ("weve wheres whove", "we've where's who've"),
        ("aint arent couldve couldnt", "ain't aren't could've couldn't"),
        ("couldn'tve hadn'tve", "couldn’t’ve hadn’t’ve"),
        ("couldn’tve", "couldn’tve"),  # the two whose written form has a straight one alone
        ("couldnt’ve she’dve", "couldn’t’ve she’d’ve"),
        ("couldnt've she'dve", "couldnt've she'dve"),
        ("somebody’d", "somebodyd"),
        ("twas", "’twas"),
        ("Im Ive", "im ive"),
        ("two cans, the red ones", "2 cans red ones"),
        ("unanswerable.", "unanswerable"),
    ],
)
def test_vizwiz_has_a_table_of_contractions_of_its_own(said: str, expected: str) -> None:
    assert vizwiz_normalised(said) == expected
    assert vizwiz_accuracy(said, (expected,) * 10) == 1.0


def test_a_contraction_that_vqav2_spells_out_scores_nothing_in_vizwiz() -> None:
    people = ("don't know",) * 9 + ("dunno",)
    assert vqa_accuracy("dont know", people) == 1.0
    assert vizwiz_accuracy("dont know", people) == 0.0
    assert vizwiz_accuracy("cant", ("can't",) * 10) == 1.0
    assert any("typographic apostrophe" in caveat for caveat in benchmark("vizwiz").caveats)


def test_a_sole_answer_is_an_exact_match() -> None:
    assert vqa_accuracy("red", ("red",)) == 1.0
    assert vqa_accuracy("Red", ("red",)) == 0.0
    assert textvqa_accuracy("Red", ("red",)) == 1.0
    assert vqa_accuracy("red", ()) == 0.0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("red/blue", "red blue"),  # a mark becomes a space
        ("red / blue", "red blue"),  # one that touches a space vanishes
        ("red/blue /", "redblue"),  # and then everywhere
        ("red-blue, green", "red blue green"),  # each mark for itself
        ("2,000", "2000"),  # a comma between digits vanishes
        ("1,5-7", "157"),  # and takes all marks with it
        ("1,,2", "1 2"),  # two commas do not
        ("red!?", "red"),
        ("(a)[b]{c}", "b c"),  # the bracketed a is an article
        ('"quoted"', "quoted"),
        ("u.s.", "us"),  # full stops vanish
        ("3.", "3"),
        ("1.5", "1.5"),  # unless a digit follows
        (".5", ".5"),
        ("v.2", "v.2"),  # also after a letter: the look-behind for a digit is misspelt
        ("." * 33 + "a b", ".a b"),  # at most 32 of them
        ("a man", "man"),
        ("The An a", ""),
        ("a", ""),  # an answer may vanish
        ("none", "0"),
        ("Ten men", "10 men"),
        ("eleven", "eleven"),
        ("twenty-two", "twenty 2"),
        ("dont", "don't"),
        ("Im", "im"),  # entries with a capital never apply, as words are in lower case
        ("Ive", "ive"),
        ("shes", "shes"),  # not in the table
        ("somebody'd", "somebodyd"),  # the one that loses its apostrophe
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("ow's'at", "'ow's'at"),
        ("it's", "it's"),  # the apostrophe is no punctuation
        ("100%", "100%"),  # nor are these
        ("$5 & #1", "$5 & #1"),
        ("RED  Ball", "red ball"),
    ],
)
def test_each_rule_of_the_official_processing(said: str, expected: str) -> None:
    assert normalised(said) == expected


def test_every_punctuation_mark_becomes_a_space_or_nothing() -> None:
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        assert normalised(f"x{mark}y") == "x y"
        assert normalised(f"x {mark}y") == "x y"
        assert normalised(f"x{mark} {mark}y") == "x y"
    for mark in ":'&%$#*^~|":
        assert normalised(f"x{mark}y") == f"x{mark}y"


def test_the_tables_are_the_official_ones() -> None:
    # 120 entries, less four that never apply for their capital and two that map to themselves
    assert len(CONTRACTIONS) == 114
    assert len(NUMBER_WORDS) == 12
    assert {NUMBER_WORDS[word] for word in NUMBER_WORDS} == {str(number) for number in range(11)}
    for written, meant in CONTRACTIONS.items():
        assert written.replace("'", "") == meant.replace("'", "")


def test_textvqa_drops_commas_and_question_marks_and_splits_the_genitive() -> None:
    assert textvqa_normalised("red,blue") == "redblue"
    assert textvqa_normalised("Why?Not") == "whynot"
    assert textvqa_normalised("1,5-7") == "15 7"  # no comma is left to join the digits
    assert textvqa_normalised("McDonald's") == "mcdonald 's"
    assert textvqa_normalised("it's") != textvqa_normalised("its")
    assert textvqa_accuracy("mcdonald 's", ("McDonald's",) * 10) == 1.0


def test_vqav2_is_broken_down_by_answer_type_question_type_and_family() -> None:
    pairs = [
        Answered(question(ten(10), "colour", answer_type="other"), "red"),
        Answered(question(ten(2), "colour", answer_type="other"), "red"),
        Answered(question(ten(3, "2"), "count", answer_type="number"), "two"),
        Answered(question(ten(10, "yes"), "relation", answer_type="yes/no"), ""),
    ]
    found = score("vqav2", pairs)
    assert found["accuracy"] == pytest.approx((1 + 0.6 + 0.9 + 0) / 4)
    assert found["questions"] == 4
    assert found["by_answer_type"]["other"] == {"accuracy": pytest.approx(0.8), "questions": 2}
    assert found["by_answer_type"]["number"] == {"accuracy": pytest.approx(0.9), "questions": 1}
    assert found["by_family"] == found["by_question_type"]
    assert found["by_family"]["relation"] == {"accuracy": 0.0, "questions": 1}
    assert found["caveats"] == []


def test_a_question_counts_for_each_held_out_pair_of_its_scene() -> None:
    pairs = [
        Answered(question(ten(10), held_out_pairs=["red star", "blue cross"]), "red"),
        Answered(question(ten(10), held_out_pairs=["red star"]), "green"),
        Answered(question(ten(10)), "red"),
    ]
    assert score("vqav2", pairs)["by_held_out_pair"] == {
        "blue cross": {"accuracy": 1.0, "questions": 1},
        "red star": {"accuracy": 0.5, "questions": 2},
    }


def test_the_result_says_where_the_formula_does_not_fit() -> None:
    sole = score("vqav2", [Answered(question(("red",)), "red"), Answered(question(("a", "b", "c")), "b"), Answered(question(()), "red")])
    assert sole["accuracy"] == pytest.approx((1 + 2 / 9) / 2)  # b of three: kept in two subsets, 1/3 each
    assert "1 of 3 questions are not scored" in sole["caveats"][0]
    assert "1 of 2 questions have one answer: exact match" in sole["caveats"][1]
    assert "1 of 2 questions have two or three answers" in sole["caveats"][2]
    hidden = score("vqav2", [Answered(question(()), "red")])
    assert hidden["accuracy"] is None
    assert hidden["questions"] == 0
    assert "server" in hidden["caveats"][0]


@pytest.mark.parametrize(
    ("said", "yes"),
    [
        ("yes", True),
        ("Yes, there is.", True),
        ("no", False),
        ("No, there is not", False),
        ("there is not a dog", False),
        ("Yes. No doubt", True),  # the first sentence alone
        ("NO", True),  # other spellings are no "no"
        ("nope", True),
        ("there isn't", True),
        ("", True),
        ("a cat", True),
        ("well,no", True),  # a comma vanishes without a space: "wellno"
        ("no\n", True),  # words are split at spaces alone
    ],
)
def test_pope_reads_no_from_three_words_and_takes_anything_else_for_yes(said: str, yes: bool) -> None:
    assert pope_says_yes(said) is yes


def test_pope_against_a_confusion_table_by_hand() -> None:
    #           label yes            label no
    # said yes      3                    2
    # said no       1                    4
    cases = [("yes", "yes")] * 2 + [("yes", "a cat")] + [("no", "Yes")] * 2 + [("yes", "No")] + [("no", "no")] * 4
    found = score("pope", [Answered(question((label,)), said) for label, said in cases])
    assert found["confusion"] == {"true_positive": 3, "false_positive": 2, "false_negative": 1, "true_negative": 4}
    assert found["accuracy"] == pytest.approx(7 / 10)
    assert found["precision"] == pytest.approx(3 / 5)
    assert found["recall"] == pytest.approx(3 / 4)
    assert found["f1"] == pytest.approx(2 * 0.6 * 0.75 / (0.6 + 0.75))
    assert found["yes_ratio"] == pytest.approx(5 / 10)  # of the predictions; of the labels it is 4 / 10


def test_a_question_that_could_not_be_asked_is_wrong_by_every_rule() -> None:
    """By the rules alone an empty answer would be POPE's yes, VQAv2's article "the", and VizWiz's "answerable"."""
    pope = score("pope", [Answered(question((label,)), "", asked=False) for label in ("yes", "no")] + [Answered(question(("no",)), "no")])
    assert pope["accuracy"] == pytest.approx(1 / 3)
    assert pope["confusion"] == {"true_positive": 0, "false_positive": 1, "false_negative": 1, "true_negative": 1}
    assert pope["yes_ratio"] == 0.0  # of what was said
    assert any("2 of 3 questions could not be asked" in caveat for caveat in pope["caveats"])
    articles = question(("the",) * 9 + ("a",))
    assert score("vqav2", [Answered(articles, "")])["accuracy"] == 1.0
    assert score("vqav2", [Answered(articles, "", asked=False)])["accuracy"] == 0.0
    people = [question(("soup",) * 10, answerable=1), question(("unanswerable",) * 10, answerable=0)]
    vizwiz = score("vizwiz", [Answered(one, "", asked=False) for one in people] + [Answered(people[1], "unanswerable")])
    assert vizwiz["unanswerable"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "questions": 3}


def test_pope_of_a_model_that_never_says_yes_is_defined() -> None:
    found = score("pope", [Answered(question((label,)), "no") for label in ("yes", "no")])
    assert (found["precision"], found["recall"], found["f1"], found["yes_ratio"]) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        (" B", None),  # the answers' file is read as it is; our answers have no white space at their ends
        ("B ", None),
        ("B. blue", "B"),
        ("B.  ", "B"),
        ("B. ", "B"),
        ("B.", None),  # LLaVA wants a space after the full stop
        ("B.\nblue", None),
        ("B\nblue", None),
        ("B: blue", None),
        ("(B)", None),
        ("C. The answer is A.", "C"),  # what it begins with counts first
        ("The answer is C.", "C"),
        ("The answer is C", None),  # it wants one more sign
        ("The answer is C!", "C"),
        ("The answer is C\nbecause", None),  # but no line break
        ("The answer is Blue.", "B"),  # any sign
        ("I think. The answer is C, for it is green", "C"),
        ("the answer is C.", None),
        ("The answer is  C.", None),
        ("The answer is A or rather The answer is B.", None),  # two answers are none
        ("The answer is A. The answer is A.", None),
        ("The answer is E. The answer is A", None),  # the one with a sign after it is E, of three choices
        ("The answer is D.", None),
        ("D", None),
        ("b", None),
        ("blue", None),
        ("", None),
        ("AB", None),
        ("FAILED", None),
    ],
)
def test_scienceqa_letters_are_read_as_llava_reads_them(said: str, letter: str | None) -> None:
    assert scienceqa_letter(said, 3) == letter


def test_scienceqa_has_five_letters_whatever_the_problem_has() -> None:
    assert [scienceqa_letter(letter, 7) for letter in "DEF"] == ["D", "E", None]
    assert scienceqa_letter("The answer is F.", 7) is None
    assert scienceqa_letter("F. six", 7) is None
    assert any("a sixth option has no letter" in caveat for caveat in benchmark("scienceqa").caveats)


def test_scienceqa_by_subject_context_and_grade() -> None:
    def problem(answer: str, image: str | None, hint: bool, subject: str, grade: int) -> Question:
        more = {"subject": subject, "grade": f"grade{grade}", "choices": ["x", "y"], "has_hint": hint}
        return question((answer,), subject, image, **more)

    pairs = [
        Answered(problem("A", "1.png", True, "natural science", 2), "A"),
        Answered(problem("B", "1.png", False, "natural science", 7), "A"),
        Answered(problem("B", None, False, "social science", 12), "B. y"),
    ]
    found = score("scienceqa", pairs)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["by_subject"]["natural science"] == {"accuracy": 0.5, "questions": 2}
    assert found["by_context"] == {
        "image": {"accuracy": 0.5, "questions": 2},
        "none": {"accuracy": 1.0, "questions": 1},
        "text": {"accuracy": 1.0, "questions": 1},
    }
    assert found["by_grade"] == {"1-6": {"accuracy": 1.0, "questions": 1}, "7-12": {"accuracy": 0.5, "questions": 2}}


def test_gqa_matches_exactly_after_lower_case_and_counts_balanced_questions() -> None:
    def asked(answer: str, structural: str, balanced: bool = True) -> Question:
        types = {"structural": structural, "semantic": "attr"}
        return question((answer,), structural, types=types, isBalanced=balanced, groups={"global": "colour"}, entailed=[])

    pairs = [
        Answered(asked("red", "query"), "Red."),
        Answered(asked("red", "query"), "the red"),
        Answered(asked("yes", "verify"), "yes"),
        Answered(asked("yes", "verify", balanced=False), "no"),
    ]
    found = score("gqa", pairs)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["by_answer"] == {"binary": {"accuracy": 1.0, "questions": 1}, "open": {"accuracy": 0.5, "questions": 2}}
    assert found["by_structural"]["query"]["questions"] == 2
    assert found["by_semantic"]["attr"]["questions"] == 3
    # gold: red 2, yes 1; said: red 1, yes 1, "the red" 1: (1 - 2)^2 / 2 + 0, of which GQA's program prints a hundredth
    assert found["distribution"] == pytest.approx(0.005)
    assert "consistency" not in found
    assert any("1 of 4" in caveat for caveat in found["caveats"])


def test_gqa_consistency_is_the_accuracy_of_what_a_right_answer_entails() -> None:
    def asked(name: str, said: str, *entailed: str, balanced: bool = True) -> Answered:
        meta = {"types": {}, "groups": {}, "isBalanced": balanced, "entailed": list(entailed)}
        return Answered(Question(name, "a.jpg", "what?", ("yes",), "yes", "", meta), said)

    pairs = [
        asked("a", "yes", "a", "b", "c"),  # itself does not count; b is right, c is not: 1/2
        asked("b", "Yes.", "d"),  # d is right: 1
        asked("c", "no", "a"),  # wrong: not counted
        asked("d", "yes", "c", balanced=False),  # not balanced: not counted
        asked("e", "yes", "a", "gone"),  # entails a question that is not in the set: not counted
        asked("f", "yes"),
    ]
    assert score("gqa", pairs)["consistency"] == {"accuracy": 0.75, "questions": 2}


def test_gqa_without_types_and_groups_is_scored_and_in_no_group() -> None:
    found = score("gqa", [Answered(question(("red",), types={}, groups={}, isBalanced=True, entailed=[]), "red")])
    assert found["accuracy"] == 1.0
    assert not [key for key in found if key.startswith("by_") or key == "distribution"]


def test_vizwiz_scores_what_is_said_to_be_unanswerable() -> None:
    pairs = [
        Answered(question(("unanswerable",) * 10, answerable=0, answer_type="unanswerable"), "Unanswerable."),
        Answered(question(("unanswerable",) * 10, answerable=0, answer_type="unanswerable"), "soup"),
        Answered(question(("soup",) * 10, answerable=1, answer_type="other"), "unanswerable"),
        Answered(question(("soup",) * 10, answerable=1, answer_type="other"), "soup"),
    ]
    found = score("vizwiz", pairs)
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["unanswerable"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "questions": 4}
    assert found["by_answerable"]["yes"] == {"accuracy": 0.5, "questions": 2}
