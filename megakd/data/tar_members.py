"""The members of a tar, and the places where it is damaged: a damaged header costs its own member, not all that follow it.

`tarfile` reads each header, with pax records, GNU's long names and sparse maps. After one that it cannot read, reading goes on at the next
block of 512 bytes with a right checksum. Archives that were appended to each other are read as one.
"""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
_RECORD = 20 * BLOCK  # filled up with zeros by Python's and GNU's writers
_MARKER = 2 * BLOCK
LARGEST_SPARSE = 1 << 28  # a sparse member may claim any size in a few bytes
_NOISE = 8  # bytes other than zero behind an end marker; what is left of a member has more
_CHUNK = 2048 * BLOCK
# What tarfile raises for damaged headers. Not OSError: the network may be at fault.
_DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, struct.error, RecursionError, IndexError)
# Headers with the name or the size of the next one, by their type and by their own name.
_EXTENSIONS = b"xgLK"
_EXTENSION_NAMES = (b"PaxHeader", b"@LongLink")

Kind = Literal["file", "sparse", "link", "folder", "special"]


@dataclass(frozen=True)
class Member:
    """start .. end: with its headers and padding.

    kind "file": `size` bytes at `offset`. "sparse": its headers and packed data, for `expand`. "link": to `target`, without bytes.
    "special": a device, a pipe, or of an unknown type.
    """

    name: str
    kind: Kind
    offset: int
    size: int
    start: int
    end: int
    target: str = ""


@dataclass(frozen=True)
class Hole:
    """Bytes start .. end without a readable member. members: how many they held, None where that cannot be told.

    cut: the tar ends here, before its end marker. tail: zeros to the end of the file, more than any writer pads with.
    seam: zeros as a writer ends an archive with; another archive was appended, unless the samples beside them tell of a loss.
    """

    start: int
    end: int
    members: int | None
    why: str
    cut: bool = False
    tail: bool = False
    seam: bool = False
    name: str = ""  # of the one member in it, where its header is whole


def members(file: IO[bytes], length: int) -> Iterator[Member | Hole]:
    """Every member and every hole of an uncompressed tar of `length` bytes, in order. Raises OSError for what cannot be read."""
    reader = _TarReader(file, length)
    at, doubtful = 0, False
    while at + BLOCK <= length:
        block = reader.block(at)
        if not any(block):
            end = reader.first_used(at)
            if end is None:
                if length - at >= _MARKER + _padding(length):
                    yield Hole(at, length, None, f"zeros from byte {at} to the end", tail=True)
                return
            if is_header(reader.block(end)) and _ends_archive(at, end):
                yield Hole(at, end, None, f"zeros at byte {at}", seam=True)
                at = end
                continue
            next_start = reader.next_header(end)
            if next_start is None and reader.is_noise(at):
                return
            yield (hole := reader.hole(at, next_start, f"zeros at byte {at}"))
            if hole.cut:
                return
            at, doubtful = hole.end, True
            continue
        try:
            info, after = reader.member(at, block)
        except _DAMAGE as error:
            next_start = reader.next_header(at + BLOCK)
            if next_start is None and reader.is_noise(at):
                return
            if next_start is None and isinstance(error, _Beyond):
                yield Hole(at, length, 1, str(error), cut=True, name=error.name)
                return
            yield (hole := reader.hole(at, next_start, f"damaged header at byte {at} ({error})"))
            if hole.cut:
                return
            at, doubtful = hole.end, True
            continue
        # a record before it may have held the whole name, and be damaged or lost
        if (doubtful or info.offset_data - at > BLOCK) and reader.is_cut_short(info):
            yield Hole(at, after, 1, f"the name of {info.name!r} at byte {at} is not whole")
        else:
            yield _member(info, at, after)
        at, doubtful = after, False
    yield Hole(at, length, None, f"no end marker at byte {at}", cut=True)


def expand(data: bytes) -> bytes:
    """The content of a sparse member, from its headers and packed data. Raises OSError when they cannot be read."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data + bytes(_MARKER)), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            info = tar.next()
            content = tar.extractfile(info) if info is not None and info.size <= LARGEST_SPARSE else None
            if content is None:
                raise OSError("no sparse member")
            return content.read()
    except _DAMAGE as error:
        raise OSError(f"its sparse map cannot be read: {error}") from error


def _member(info: tarfile.TarInfo, at: int, after: int) -> Member:
    kind: Kind = "special"
    offset, size, target = info.offset_data, 0, ""
    if info.issparse():
        if info.size <= LARGEST_SPARSE:
            kind, offset, size = "sparse", at, after - at
    elif info.isreg():
        kind, size = "file", info.size
    elif info.islnk() or info.issym():
        kind, target = "link", info.linkname if info.islnk() else f"{info.name.rpartition('/')[0]}/{info.linkname}"
    elif info.isdir():
        kind = "folder"
    return Member(info.name, kind, offset, size, at, after, target)


class _Beyond(tarfile.HeaderError):
    """The member `name` ends behind the end of the file."""

    def __init__(self, name: str, end: int, length: int) -> None:
        super().__init__(f"{name!r} ends at byte {end} of {length}")
        self.name = name


class _TarReader:
    def __init__(self, file: IO[bytes], length: int) -> None:
        self._file, self._length = file, length
        # a TarFile for its settings alone: it is not asked to look for members, since it ends at the first that is damaged
        self._tar = tarfile.open(fileobj=io.BytesIO(bytes(_RECORD)), mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        self._tar.fileobj = file

    def block(self, at: int) -> bytes:
        self._file.seek(at)
        return self._file.read(BLOCK)

    def member(self, at: int, block: bytes) -> tuple[tarfile.TarInfo, int]:
        """The member whose headers begin at `at` with `block`, and where the next ones do. Raises one of _DAMAGE."""
        if block[156] in _EXTENSIONS and tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size > _CHUNK:
            raise tarfile.HeaderError("a name or record of more than a megabyte")
        self._file.seek(at)
        info = tarfile.TarInfo.fromtarfile(self._tar)
        after = int(self._tar.offset)
        # a negative size would send the reader backwards for ever (CVE-2025-8194)
        if info.size < 0 or after <= at or info.offset_data > after:
            raise tarfile.HeaderError("impossible size")
        if after > self._length:
            # of the last member the padding may be missing, its bytes may not
            if info.issparse() or info.offset_data + info.size > self._length:
                raise _Beyond(info.name, after, self._length)
            after = self._length
        return info, after

    def is_cut_short(self, info: tarfile.TarInfo) -> bool:
        """Whether a name is the header's own, in the form that writers give it after a record with the whole one."""
        if info.issparse():
            return False
        own = self.block(info.offset_data - BLOCK)[:100]
        full_name = own.rstrip(b"\0").decode("utf-8", "surrogateescape")
        return info.name == full_name and (len(own.rstrip(b"\0")) == len(own) or "?" in full_name)

    def first_used(self, at: int) -> int | None:
        """The first block from `at` on that is not all zeros."""
        for start, blocks in self._chunks(at):
            used = blocks.any(axis=1)
            if used.any():
                return start + int(used.argmax()) * BLOCK
        last = self._length // BLOCK * BLOCK  # what follows is less than a block
        self._file.seek(last)
        return last if at <= last < self._length and any(self._file.read(BLOCK)) else None

    def is_noise(self, at: int) -> bool:
        """Whether from `at` on there is an end marker with no more than a few flipped bits in it and behind it."""
        used = sum(int(np.count_nonzero(blocks)) for _, blocks in self._chunks(at))
        return self._length - at >= _MARKER and used <= _NOISE

    def next_header(self, at: int) -> int | None:
        """The next block from `at` on that is a header by its checksum."""
        for start, blocks in self._chunks(at):
            field = blocks[:, 148:156]
            # octal digits, blanks and zeros: one other block in thousands passes
            octal = (((field >= 0x30) & (field <= 0x37)) | (field == 0x20) | (field == 0)).all(axis=1) & (field >= 0x30).any(axis=1)
            for number in np.flatnonzero(octal).tolist():
                if is_header(blocks[number].tobytes()):
                    return start + number * BLOCK
        return None

    def _chunks(self, at: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        while at + BLOCK <= self._length:
            self._file.seek(at)
            data = self._file.read(min(_CHUNK, (self._length - at) // BLOCK * BLOCK))
            blocks = np.frombuffer(data[: len(data) // BLOCK * BLOCK], np.uint8).reshape(-1, BLOCK)
            if not len(blocks):
                return
            yield at, blocks
            at += len(blocks) * BLOCK

    def hole(self, start: int, next_start: int | None, why: str) -> Hole:
        """The hole from `start` to the next header; without one, to the zeros that end the file, or to its cut end."""
        if next_start is not None:
            return Hole(start, next_start, self._lost(start, next_start), why)
        counts = np.concatenate([np.zeros(0, np.int64), *(np.count_nonzero(used, axis=1) for _, used in self._chunks(start + BLOCK))])
        rest = counts[::-1].cumsum()[::-1]  # bytes other than zero from each block on
        zeros = start + BLOCK + BLOCK * int((rest > _NOISE).sum())
        if self._length - zeros < _MARKER:
            zeros = start + BLOCK + BLOCK * int((rest > 0).sum())
        cut = self._length - zeros < BLOCK or self._length % BLOCK != 0
        end = self._length if cut else zeros
        return Hole(start, end, self._lost(start, end), why, cut=cut)

    def _lost(self, start: int, end: int) -> int | None:
        """Members between, by the sizes that damaged headers still tell; None where headers are gone."""
        count, at = 0, start
        while at < end:
            block = self.block(at)
            if sum(one == other for one, other in zip(block[257:262], b"ustar", strict=False)) < 4:
                return None
            extension = block[156] in _EXTENSIONS or any(name in block[:100] for name in _EXTENSION_NAMES)
            count += not extension
            try:
                size = int(block[124:136].rstrip(b"\0 ") or b"0", 8)
            except ValueError:
                return count
            after = at + BLOCK + -(-size // BLOCK) * BLOCK
            if after > end:  # its size is damaged, or the file ends first
                return count
            at = after
        return count


def is_header(block: bytes) -> bool:
    """Whether the checksum in these 512 bytes is theirs."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except _DAMAGE:
        return False
    return True


def _ends_archive(at: int, end: int) -> bool:
    """Whether zeros from `at` to `end` can be a writer's end of an archive, to which another was appended."""
    return end - at == _MARKER or (end - at >= _MARKER and end % _RECORD == 0 and end - at < _MARKER + _RECORD)


def _padding(length: int) -> int:
    """The largest record that a file of `length` bytes can have been filled up to: tar's own, or a power of two up to a megabyte."""
    own = length % _RECORD == 0
    powers = [BLOCK << power for power in range(7 if own else 0, 12)]
    return max([_RECORD if own else 0, *(record for record in powers if length % record == 0)])
