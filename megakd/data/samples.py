"""From the members of a tar to its samples, and what was lost on the way: webdataset's keys, one row a sample."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

from megakd.data.tar_members import BLOCK, Hole, Member

Slot = str  # of SLOTS, or the extension of a further member
SLOTS: tuple[Slot, ...] = ("image", "caption", "json", "cls")
IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif"})
# webdataset's rule: the key is the folder and the base name up to its first dot, the extension is the rest
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]*)$", re.DOTALL)
_NUMBER = re.compile(r"([0-9]{1,18})[^0-9]*$")  # the last of a key


def slots_of(captions: tuple[str, ...]) -> dict[str, Slot]:
    """The slots of the members, by extension, that captions are read from: the first is "caption", others are called as their extension."""
    return {captions[0]: "caption", **{extension: extension for extension in captions[1:]}}


_ADDRESS = "url.txt"  # DataComp's member, where the image was; no caption of a key with a dot

# Where a member's bytes are: (offset, size, sparse or not).
BytesPlace = tuple[int, int, bool]


@dataclass
class TarSample:
    """One sample: its members by slot, a link by its target until links are followed; start .. end: its bytes in the tar."""

    key: str
    slots: dict[Slot, BytesPlace | str] = field(default_factory=dict)
    extensions: set[str] = field(default_factory=set)
    start: int = 0
    end: int = 0


@dataclass
class Losses:
    """lost: samples that damage took from the tar; certain: those of them that are not estimated by bytes; why: the first damage.

    open_end: the tar's end is missing, with a number of samples that cannot be told. dropped: samples whose members are there and not used,
    by reason; unused: such members of samples that are used; each with an example.
    """

    lost: int = 0
    certain: int = 0
    open_end: bool = False
    why: str = ""
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)
    unused: dict[str, tuple[int, str]] = field(default_factory=dict)


class SampleBuilder:
    """Members grouped into samples by their key, over the whole tar and in order of first appearance.

    The same name once more, as in shards appended to each other, begins another sample of that key. Of two images of a sample under
    different extensions the first counts. Links are followed inside the tar. A sample that damage made incomplete counts as lost.
    captions: extensions of the members that captions are read from; a sample needs one of them. further: of others that are kept as well.
    """

    def __init__(self, captions: tuple[str, ...], further: tuple[str, ...] = ()) -> None:
        self.rows: list[TarSample] = []
        self.losses = Losses()
        self._captions, self._further = slots_of(captions), frozenset(further)
        self._texts = {extension.rpartition(".")[2] for extension in captions} - {"json"}  # a further .json of a sample is no lost caption
        self._row_of: dict[str, int] = {}
        self._places: dict[str, BytesPlace] = {}
        self._links: list[tuple[int, Slot, str]] = []
        self._dotted: dict[str, tuple[str, set[str], str]] = {}
        self._homeless: dict[str, tuple[str, str]] = {}
        self._holes: list[tuple[Hole, int, int | None]] = []  # with the rows before and after it
        self._latest = -1
        self._members = 0

    def add(self, member: Member) -> None:
        if member.kind == "folder":
            return
        self._members += 1
        if member.kind in ("file", "sparse"):
            self._places[_plain(member.name)] = (member.offset, member.size, member.kind == "sparse")
        match = _NAME.match(member.name)
        if match is None:
            if self._looks_like_data(member.name.rpartition("/")[2].rpartition(".")[2]):
                self._count_unused("names that begin with a dot", member.name)
            return
        key, extension = match.group(1), match.group(2).lower()
        slot = self._slot(extension)
        if slot is None:
            self._count_other(key, extension, member.name)
        elif member.kind == "special" or member.size >= 1 << 32:
            self._homeless.setdefault(key, ("members that are no plain files", member.name))
        else:
            self._place(key, extension, slot, member)

    def damage(self, hole: Hole) -> None:
        match = _NAME.match(hole.name)
        if match is not None and match.group(1) in self._row_of:  # a sample that is here, and shows what it lacks
            hole = replace(hole, members=0)
        self._holes.append((hole, self._latest, None))

    def finish(self) -> None:
        """Follow the links, drop what damage made incomplete, and count."""
        self._follow_links()
        empty = {number for number, row in enumerate(self.rows) if not row.slots}  # broken links alone
        broken = self._lost_to_damage(empty)
        kept = [row for number, row in enumerate(self.rows) if number not in empty | broken]
        self._count_dropped({row.key for row in kept})
        self.rows = kept

    def _place(self, key: str, extension: str, slot: Slot, member: Member) -> None:
        number = self._row_of.get(key)
        if number is None or extension in self.rows[number].extensions:
            number = self._row_of[key] = len(self.rows)
            self.rows.append(TarSample(key, start=member.start))
        row, self._latest = self.rows[number], number
        if self._holes and self._holes[-1][2] is None:
            self._holes = [(hole, before, number if after is None else after) for hole, before, after in self._holes]
        row.extensions.add(extension)
        row.end = max(row.end, member.end)
        if slot in row.slots:
            self._count_unused(f"further {slot}s of a sample", member.name)
        elif member.kind == "link":
            row.slots[slot] = member.target
            self._links.append((number, slot, member.name))
        else:
            row.slots[slot] = (member.offset, member.size, member.kind == "sparse")

    def _slot(self, extension: str) -> Slot | None:
        if extension in self._captions:
            return self._captions[extension]
        if extension in self._further:
            return extension
        if extension in IMAGES:
            return "image"
        return "json" if extension == "json" else "cls" if extension == "cls" else None

    def _looks_like_data(self, extension: str) -> bool:
        return extension.lower() in IMAGES or extension.lower() in self._texts

    def _count_other(self, key: str, extension: str, name: str) -> None:
        """A member of another kind, or one whose key has a dot, at which webdataset ends it."""
        more, dot, last = extension.rpartition(".")
        if dot and self._looks_like_data(last) and not (self._further and extension == _ADDRESS):
            _, kinds, _ = self._dotted.setdefault(f"{key}.{more}", (key, set(), name))
            kinds.add("image" if last in IMAGES else "caption")

    def _count_unused(self, kind: str, name: str, count: int = 1) -> None:
        before, example = self.losses.unused.get(kind, (0, name))
        self.losses.unused[kind] = (before + count, example)

    def _follow_links(self) -> None:
        nowhere: list[tuple[int, str]] = []
        for number, slot, name in self._links:
            place = self._places.get(_plain(str(self.rows[number].slots[slot])))
            if place is None:
                del self.rows[number].slots[slot]
                nowhere.append((number, name))
            else:
                self.rows[number].slots[slot] = place
        for number, name in nowhere:
            if self.rows[number].slots:
                self._count_unused("links that lead nowhere", name)
            else:
                self._homeless.setdefault(self.rows[number].key, ("links that lead nowhere", name))

    def _count_dropped(self, keys: set[str]) -> None:
        """Count samples of which no member is used, by reason; members of samples that are used count as unused."""
        lost: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for key, (why, name) in self._homeless.items():
            if key in keys:
                self._count_unused(why, name)
            else:
                lost[why] += 1
                examples.setdefault(why, name)
        why = "keys with dots (webdataset ends a key at the first dot)"
        for base, kinds, name in self._dotted.values():
            if base in keys and len(kinds) == 1:
                self._count_unused(f"members with {why}", name)
            else:
                lost[why] += 1
                examples.setdefault(why, name)
        self.losses.dropped = {why: (count, examples[why]) for why, count in lost.items()}

    def _lost_to_damage(self, empty: set[int]) -> set[int]:
        """The rows beside a hole that lack what most others have; sets the numbers of lost samples."""
        if not self._holes:
            return set()
        there = [row for number, row in enumerate(self.rows) if number not in empty]
        known: set[Slot] = {*SLOTS, *self._captions.values(), *self._further}
        needed = {"image", "caption"} if len(self._captions) == 1 else {"image"}
        expected = {slot for slot in known if there and sum(slot in row.slots for row in there) * 2 >= len(there)} or needed
        partial = {number for number, row in enumerate(self.rows) if number not in empty and not expected <= set(row.slots)}
        # apart: all images come first and then all captions, and a hole's neighbours tell nothing
        apart = sum(later.start < earlier.end for earlier, later in pairwise(self.rows)) * 10 > len(self.rows)
        self._holes = [held for held in self._holes if not held[0].seam or (not apart and self._is_damage(*held))]
        self.losses.why = self._holes[0][0].why if self._holes else ""
        near = {number for _, before, after in self._holes for number in (before, after) if number is not None and number >= 0}
        undamaged = [row for number, row in enumerate(self.rows) if number not in near | empty]
        broken = partial & near if not apart else set()
        each = max(1, round(self._members / len(self.rows)) if self.rows else len(expected))
        wanted = expected | needed if apart else expected
        lacking = [number for number in range(len(self.rows)) if number not in empty] if apart else broken
        missing = {number: len(wanted - set(self.rows[number].slots)) for number in lacking}
        footprint = _median(row.end - row.start for row in undamaged) or _median(row.end - row.start for row in self.rows)
        certain, guessed, members, beside_known = len(broken), 0, 0, set(missing) if apart else set()
        for hole, before, after in self._holes:
            beside = {number for number in (before, after) if number in broken}
            if hole.members is not None:
                members, beside_known = members + hole.members, beside_known | beside
            elif not hole.cut:
                guessed += self._wholly_lost(hole, beside, footprint)
            self.losses.open_end |= hole.cut or hole.tail
        # what the holes' neighbours lack was in the holes; the other members were whole samples
        certain += -(-max(0, members - sum(missing[number] for number in beside_known)) // each)
        pairs = ["image" in row.slots and any(slot in row.slots for slot in self._captions.values()) for row in self.rows]
        shows_in_rows = (apart and not all(pairs)) or not any(pairs)
        if not certain + guessed and not shows_in_rows and any(hole.cut for hole, _, _ in self._holes):
            guessed = 1
        self.losses.lost, self.losses.certain = certain + guessed, certain
        return broken

    def _is_damage(self, seam: Hole, before: int, after: int | None) -> bool:
        """Whether samples were lost in zeros that look like the end of an archive: one beside them lacks what the next one away from them
        has, or the numbers in keys, which rise by one elsewhere, skip here as many as there is room for."""
        if after is None or before < 0:
            return False
        rows, slots = self.rows, [set(row.slots) for row in self.rows]
        if (before > 0 and slots[before - 1] > slots[before]) or (after + 1 < len(rows) and slots[after + 1] > slots[after]):
            return True
        numbers = [int(match.group(1)) if (match := _NUMBER.search(row.key)) else 0 for row in rows]
        if not 0 < numbers[after] - numbers[before] - 1 <= (seam.end - seam.start) // (2 * BLOCK):
            return False
        return sum(later - earlier == 1 for earlier, later in pairwise(numbers)) >= 0.9 * (len(numbers) - 2)

    def _wholly_lost(self, hole: Hole, beside: set[int], footprint: int) -> int:
        """Samples of which a hole left no member, estimated by its bytes."""
        start = min([hole.start, *(self.rows[number].start for number in beside if self.rows[number].start < hole.start)])
        end = max([hole.end, *(self.rows[number].end for number in beside)])
        if not footprint:
            return 0 if beside else 1
        return max(0 if beside else 1, round((end - start) / footprint) - len(beside))


def _median(values: Iterable[int]) -> int:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0


def _plain(name: str) -> str:
    """A member's name as links give it, without './', '/' and '..'; it never becomes a path."""
    return posixpath.normpath("/" + name.lstrip("/")).lstrip("/")
