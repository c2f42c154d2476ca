"""`data.captions`: which texts are a sample's captions, and which is drawn, alike for every number of ranks and after a resume."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from faults.damage import VALUES, flipped
from megakd.data.bad_samples import BadSample
from megakd.data.caption_survey import survey
from megakd.data.captions import CaptionPolicy, Captions
from megakd.data.pairs import Batch, train_batches
from megakd.data.sampler import Order
from megakd.data.shards import ShardSet
from megakd.data.store.views import StoredViews
from megakd.data.transforms import TowerView
from megakd.recipe import Views
from support.loaders import BATCH, TOWERS, take
from support.shards import ByteTokenizer, Member, data, jpeg, no_barrier, open_shards, pair, text_of, write_tar

SOURCES = {"txt": 0.75, "json:syn.texts": 0.25}


def policy(captions: dict[str, float], clean: tuple[str, ...] = ()) -> CaptionPolicy:
    return CaptionPolicy.of(data("a.tar", captions=captions, clean=list(clean)))


def members(number: int) -> list[Member]:
    """A text, and as many texts in the JSON as the number's remainder by 4."""
    written = [f"synthetic {number}.{place}" for place in range(number % 4)]
    content = json.dumps({"number": number, "score": float("nan"), "syn": {"texts": written}})
    return [(f"{number:03d}.jpg", jpeg(number)), (f"{number:03d}.txt", b"caption %d" % number), (f"{number:03d}.json", content.encode())]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    path = write_tar(tmp_path_factory.mktemp("several") / "0.tar", [one for number in range(40) for one in members(number)])
    return open_shards(str(path), captions=SOURCES)


# What a sample's captions are


@pytest.mark.parametrize(
    ("spelled", "found"),
    [
        ("txt", ["  one\ntwo\n\n"]),
        ("txt:lines", ["  one", "two"]),
        ("json:text", ["a text"]),
        ("json:list", ["a", "b"]),
        ("json:list.1", ["b"]),
        ("json:deep.er.text", ["down here"]),
        ("json:each.raw", ["x", "y", "z"]),
        ("json:each.0.raw", ["x"]),
        ("json:mixed", ["said"]),
    ],
)
def test_a_source_is_a_member_its_lines_or_a_field_of_json(spelled: str, found: list[str]) -> None:
    content = {
        "text": "a text", "list": ["a", "b"], "deep": {"er": {"text": "down here"}},
        "each": [{"raw": "x"}, {"raw": ["y", "z"]}, {"other": 1}], "mixed": ["said", None, " \n"],
    }  # fmt: skip
    one = policy({spelled: 1})
    written = {"txt": b"  one\ntwo\n\n", "json": json.dumps(content).encode()}
    assert list(one.read({slot: written[name] for name, slot in one.slots.items()}).texts) == found


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"re": "a', "bad_json"),
        (b'{"re": "a", "re": "b"}', "bad_json"),
        (b'{"re": 3}', "bad_json"),
        (b'{"re": ["a", {}]}', "bad_json"),
        (b'{"re": "\\ud800"}', "bad_json"),
        (b"\xff\xfe", "bad_json"),
        (b'{"re": "a\\u0000b"}', "bad_text"),
        (b'{"re": null}', "missing_caption"),
        (b'{"other": "a"}', "missing_caption"),
        (b"[1, 2]", "missing_caption"),
        (b'{"re": []}', "missing_caption"),
        (b'{"re": " "}', "empty_caption"),
    ],
)
def test_a_damaged_json_and_one_without_a_caption_are_bad_samples(content: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        policy({"json:re": 1}).read({"caption": content})
    assert caught.value.reason == reason


def test_whatever_a_json_holds_it_gives_texts_or_a_bad_sample() -> None:
    one, draw = policy({"json:deep.re": 0.5, "json:deep.0.re": 0.5}), random.Random(5)
    reasons = set[str]()
    for number in range(1500):
        content = {
            "deep": draw.choice([{"re": draw.choice(VALUES)}, [{"re": draw.choice(VALUES)}, draw.choice(VALUES)], draw.choice(VALUES)])
        }
        written = json.dumps(content, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        if number % 3:
            written = flipped(written, draw.randrange(len(written)), draw)[: draw.choice([None, draw.randrange(len(written))])]
        try:
            assert all(isinstance(text, str) and text.strip() for text in one.read({"caption": written}).texts)
        except BadSample as bad:
            reasons.add(bad.reason)
    assert reasons == {"bad_json", "bad_text", "missing_caption", "empty_caption"}


def test_a_sample_that_lacks_a_source_has_the_captions_of_the_others() -> None:
    both = policy({"json:re": 0.5, "txt": 0.5})
    assert both.read({"caption": b"text", "json": b'{"re": ["a", "b"]}'}) == Captions(("a", "b", "text"), (0, 0, 1))
    assert both.read({"caption": b"text"}) == Captions(("text",), (1,))
    assert both.read({"caption": b"", "json": b'{"re": "a"}'}) == Captions(("a",), (0,))
    with pytest.raises(BadSample, match=r"json:re, txt"):
        both.read({})
    with pytest.raises(BadSample) as caught:  # a good text beside it does not hide that a member is damaged
        both.read({"caption": b"text", "json": b'{"re": '})
    assert caught.value.reason == "bad_json"


@pytest.mark.parametrize(
    ("steps", "text", "left"),
    [
        ((), "A <b>Dog</b>  at http://x.org/a?b", "A <b>Dog</b>  at http://x.org/a?b"),
        (("urls",), "A dog, see HTTPS://x.org/a?b=1 or www.dogs.com", "A dog, see or"),
        (("tags",), "A <b>Dog</b><br/>&lt;i&gt; 1 < 2 > 0", "A Dog 1 < 2 > 0"),
        (("lower",), "A  Dog", "a  dog"),
        (("lower", "urls", "tags"), "<P>Ein Über http://a.b", "ein über"),
    ],
)
def test_what_clean_takes_out(steps: tuple[str, ...], text: str, left: str) -> None:
    assert policy({"txt": 1}, steps).read({"caption": text.encode()}).texts == (left,)
    assert policy({"txt:lines": 1}, steps).read({"caption": text.encode()}).texts == (left,)


def test_a_caption_of_which_cleaning_leaves_nothing_is_none() -> None:
    with pytest.raises(BadSample, match=r"data\.clean"):
        policy({"txt": 1}, ("urls",)).read({"caption": b"http://a.b/c"})
    assert policy({"txt": 0.5, "json:re": 0.5}, ("urls",)).read({"caption": b"www.a.b", "json": b'{"re": "a"}'}).texts == ("a",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"captions": {"txt": 0.0, "json:a": 0.0}}, "the weights sum to 0"),
        ({"captions": {"txt": -0.5, "json:a": 1.0}}, "greater than or equal to 0"),
        ({"captions": {}}, "0 sources"),
        ({"captions": {"json": 1.0}}, r'data.captions = \{ "json:FIELD" = 1 \}'),
        ({"captions": {"txt:first": 1.0}}, "fields are those of JSON"),
        ({"captions": {"json:a..b": 1.0}}, "names no field"),
        ({"captions": {"txt": 0.5, ".TXT": 0.5}}, "are one source"),
        ({"captions": {"txt": 1.0}, "caption": "txt"}, "keep one of them"),
        ({"caption": "json"}, r'caption = .*data.captions = \{ "json:FIELD" = 1 \}'),
        ({"caption": "syn.json"}, r'data.captions = \{ "syn.json:FIELD" = 1 \}'),
        ({"clean": ["ftfy"]}, "every tokenizer of open_clip cleans itself"),
        ({"clean": ["urls", "urls"]}, "twice"),
    ],
)
def test_what_makes_no_sense_is_refused_with_one_message(given: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said) as caught:
        data("a.tar", **given)
    assert caught.value.error_count() == 1


def test_a_recipe_with_captions_is_read_back_as_it_is_written_and_its_order_changes_nothing() -> None:
    one, other = data("a.tar", captions={"txt": 1, "json:a": 3}), data("a.tar", captions={"json:a": 0.75, "txt": 0.25})
    assert "caption" not in one.model_dump()
    assert data(**one.model_dump()) == one
    assert CaptionPolicy.of(one) == CaptionPolicy.of(other)
    assert CaptionPolicy.of(data("a.tar", captions={"txt": 2})) == CaptionPolicy.of(data("a.tar"))


# Which is drawn


def test_long_run_shares_are_the_weights_and_those_of_a_list_are_equal() -> None:
    of = policy({"txt": 0.5, "json:re": 0.3, "alt": 0.2})  # by name: alt, json:re, txt
    drawn = Counter(of.draw(Captions(("alt", "re 0", "re 1", "re 2", "txt"), (0, 1, 1, 1, 2)), 5, (place, 0)) for place in range(8000))
    assert np.abs(np.array([drawn[number] / 8000 for number in range(5)]) - [0.2, 0.1, 0.1, 0.1, 0.5]).max() < 0.015
    lacking = Counter(of.draw(Captions(("alt", "txt"), (0, 2)), 5, (place, 0)) for place in range(8000))
    assert abs(lacking[0] / 8000 - 0.2 / 0.7) < 0.015
    assert [of.draw(Captions(("a", "b"), (0, 2)), 5, (place, 0)) for place in range(20)] != [
        of.draw(Captions(("a", "b"), (0, 2)), 6, (place, 0)) for place in range(20)
    ]


def texts(batches: list[Batch]) -> list[str]:
    return [text_of(row) for batch in batches for row in batch.tokens["teacher"]]


def test_a_batchs_captions_are_those_that_the_policy_draws_for_its_positions(several: ShardSet) -> None:
    batches = take(several, 5)
    for row, (batch, index) in enumerate((one, int(index)) for one in batches for index in one.index):
        captions = several.captions.read(several.read(index, several.captions.needs).members)
        number = several.captions.draw(captions, 3, (row, 0))
        place = row % BATCH
        assert text_of(batch.tokens["teacher"][place]) == captions.texts[number][:20]
        assert batch.drawn is not None
        assert several.captions.sources[int(batch.drawn.source[place])].name == (
            "txt" if captions.texts[number].startswith("c") else "json:syn.texts"
        )
        assert bool(batch.drawn.lacking[place]) == (index % 4 == 0)
    assert {text[0] for text in texts(batches)} == {"c", "s"}


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2)])
def test_any_number_of_ranks_and_workers_draws_the_same_captions(several: ShardSet, world: int, workers: int) -> None:
    whole = take(several, 6)
    ranks = [take(several, 6, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert [text for parts in zip(*ranks, strict=True) for text in texts(list(parts))] == texts(whole)


def test_a_resumed_stream_draws_the_captions_that_would_have_followed(several: ShardSet) -> None:
    whole = take(several, 12)  # over an epoch's end: the same samples get other captions
    assert texts(take(several, 8, start=whole[3].next_position)) == texts(whole[4:])
    by_epoch = [
        dict(zip(np.concatenate([batch.index for batch in part]).tolist(), texts(part), strict=True)) for part in (whole[:5], whole[5:10])
    ]
    assert any(by_epoch[0][index] != by_epoch[1][index] for index in by_epoch[0].keys() & by_epoch[1].keys())


def test_one_source_changes_no_batch_and_leaves_the_index_alone(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "0.tar", [one for number in range(10) for one in members(number)]))
    plain, weighed = open_shards(path), open_shards(path, captions={"txt": 0.5})
    assert (plain.signature, len(list(tmp_path.glob("*.npy")))) == (weighed.signature, 1)
    one, other = take(plain, 2), take(weighed, 2)
    assert texts(one) == texts(other)
    assert all(torch.equal(a.pixels["student"], b.pixels["student"]) for a, b in zip(one, other, strict=True))
    assert one[0].drawn is other[0].drawn is None


# The index


def test_every_set_of_members_has_its_own_index_whose_rows_grow_by_further_members_alone(tmp_path: Path) -> None:
    content = [one for number in range(9) for one in (*members(number), (f"{number:03d}.alt", b"alt"))]
    path = str(write_tar(tmp_path / "0.tar", content))
    choices: list[dict[str, float]] = [
        {"txt": 1},
        {"txt": 1, "json:number": 1},
        {"alt": 1, "txt": 1, "json:syn.texts": 1},
        {"json:syn.texts": 1},
    ]
    opened = [open_shards(path, captions=one, max_bad_fraction=0.5) for one in choices]
    assert len({one.signature for one in opened}) == 4
    stored = {file.name.removesuffix(".npy"): np.load(file).dtype.itemsize for file in tmp_path.glob("*.npy")}
    sizes = sorted(stored.values())
    assert len(sizes) == 4
    assert sizes[0] == sizes[2] == sizes[3] - 16
    with pytest.MonkeyPatch.context() as patched:  # each is found again
        patched.setattr("megakd.data.tar_index._scan", None)
        assert [open_shards(path, captions=one, max_bad_fraction=0.5).signature for one in choices] == [one.signature for one in opened]


def test_an_index_whose_file_is_called_alike_is_not_taken_for_other_members(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "0.tar", [one for number in range(3) for one in members(number)]))
    assert open_shards(path, captions={"txt": 1, "json:syn.texts": 1}).known_bad.total == 0
    with pytest.raises(ValueError, match=r"read from \.txt_json members"):
        open_shards(path, caption="txt_json")
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_other_json_is_another_set_only_where_captions_are_read_from_it(tmp_path: Path) -> None:
    def signatures(json_of_1: bytes) -> tuple[int, int]:
        path = str(write_tar(tmp_path / "0.tar", [*pair("a", 0), ("b.jpg", jpeg(1)), ("b.txt", b"b"), ("b.json", json_of_1)]))
        return open_shards(path).signature, open_shards(path, captions={"txt": 1, "json:re": 1}).signature

    before, after = signatures(b'{"re": "x"}'), signatures(b'{"re": "y"}')
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_samples_without_one_of_the_members_are_counted_and_said_and_those_without_any_are_bad(tmp_path: Path, caplog) -> None:
    content = [
        one for number in range(10) for one in members(number) if one[0] not in ("003.json", "005.json", "007.txt", "008.txt", "008.json")
    ]
    path = str(write_tar(tmp_path / "0.tar", content))
    shards = open_shards(path, captions=SOURCES, max_bad_fraction=0.5)
    assert shards.known_bad.counts == {"missing_caption": 1}
    assert {name: (count, example.rpartition(" ")[2]) for name, (count, example) in shards.lacking.items()} == {
        "json": (2, "003"),
        "txt": (1, "007"),
    }
    assert "2 of 10 samples have no .json member, so that their captions are drawn from the others" in caplog.text
    assert ShardSet.open(data(path, captions=SOURCES), 0, 1, no_barrier, captions=False).known_bad.total == 0


# What is looked at before a run


def test_a_survey_tells_how_many_samples_have_each_source(several: ShardSet) -> None:
    found = survey(several)
    assert (found.samples, found.has, found.captions) == (40, {"json:syn.texts": 30, "txt": 40}, {"json:syn.texts": 60, "txt": 40})
    assert "json:syn.texts 30 with 60, txt 40" in str(found)


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        (
            {"txt": 1, "json:sny.texts": 1},
            r"'json:sny.texts': none of 6 .json members .*there are json:number, json:score, json:syn\. did you mean",
        ),
        ({"json:caption": 1}, r"'json:caption': none of 6"),
        ({"txt": 1, "alt": 1}, r"'alt': no sample has a \.alt member"),
        ({"txt": 1, "syn.json:texts": 1}, r"'syn.json:texts': no sample has a \.syn\.json member"),
    ],
)
def test_a_source_that_no_sample_has_is_refused_by_name(tmp_path: Path, captions: dict[str, float], said: str) -> None:
    path = str(write_tar(tmp_path / "0.tar", [one for number in range(6) for one in members(number)]))
    with pytest.raises(ValueError, match=f"data.captions: {said}"):
        survey(open_shards(path, captions=captions))


# A store's views


def test_a_stores_views_have_their_captions_by_sample_and_view(several: ShardSet) -> None:
    source = StoredViews(several, Views(), 7, TOWERS["teacher"])
    index_N = np.arange(40)
    drawn = [source.see(index_N, np.full((40, 1), view)) for view in range(3)]
    for view, seen in enumerate(drawn):
        for index, row in zip(seen.index.tolist(), seen.tokens, strict=True):
            captions = several.captions.read(several.read(index, several.captions.needs).members)
            assert text_of(row) == captions.texts[several.captions.draw(captions, 7, (index, 1 + view))][:20]
    assert not torch.equal(drawn[0].tokens, drawn[1].tokens)
    every = StoredViews(several, Views(), 7, TOWERS["teacher"], every=True).see(index_N, np.zeros((40, 1), np.int64))
    assert every.captions.tolist() == [1 + number % 4 for number in range(40)]
    assert [text_of(row) for row in every.tokens[:7]] == [
        "caption 0", "synthetic 1.0", "caption 1", "synthetic 2.0", "synthetic 2.1", "caption 2", "synthetic 3.0"
    ]  # fmt: skip


def test_images_alone_draw_nothing(several: ShardSet) -> None:
    order, towers = Order(len(several), BATCH, 3, 4, 3), {"student": TowerView(TOWERS["student"].preprocess, ByteTokenizer(4))}
    loading = {"rank": 0, "world": 1, "start_position": 0, "workers": 0, "pin_memory": False}
    with train_batches(several, order, Views(), towers, captions=False, **loading) as batches:
        (batch,) = itertools.islice(batches, 1)
    assert batch.drawn is None
    assert not batch.tokens["student"].any()
