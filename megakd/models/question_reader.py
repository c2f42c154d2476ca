"""A small reader of questions over patch tokens, which chooses among a closed vocabulary of answers.

A transformer over the question's words whose every layer also attends to the image: the words of "left of the blue star" may look at
different patches, and a second layer relates what they saw. So are MCAN's guided attention and LXMERT's cross-modality layers built
(arXiv 1906.10770, 1908.07490); the answer is a classification, as in VQA's first models (arXiv 1505.00468).

Legend: B questions, L words and a place in front of them, V image tokens, C their channels, W the reader's width, A answers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HEADS, LAYERS = 4, 2
PAD, UNKNOWN, SUMMARY = 0, 1, 2  # ids of what is no word; words follow
_MASKED = -1e9


class QuestionReader(nn.Module):
    """words: ids, those of no word among them. places: longest question in words. image: (V, C) of an image; None: it sees none."""

    def __init__(self, words: int, places: int, image: tuple[int, int] | None, answers: int, width: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(places + 1, width) * 0.02)
        nn.init.normal_(self.words.weight, std=0.5)
        self.see = None if image is None else nn.Linear(image[1], width)
        if image is not None:
            self.patches, self.seen = nn.Parameter(torch.randn(image[0], width) * 0.5), nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Layer(width, sees=image is not None) for _ in range(LAYERS))
        self.last, self.answer = nn.LayerNorm(width), nn.Linear(width, answers)

    def forward(self, word_BL: Tensor, image_BVC: Tensor | None) -> Tensor:
        """(B, A) logits. word_BL: ids, SUMMARY in front, PAD behind. image_BVC: of about unit deviation; None for one without images."""
        state_BLW = self.words(word_BL) + self.places[: word_BL.shape[1]]
        image_BVW = None if self.see is None else self.seen(self.see(image_BVC) + self.patches)
        *first, last = self.layers
        for layer in first:
            state_BLW = layer(state_BLW, word_BL == PAD, image_BVW)
        state_BLW = last(state_BLW, word_BL == PAD, image_BVW, 1)  # the answer reads the first place alone
        return self.answer(self.last(state_BLW[:, 0]))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    """Attention among the words, then of each word to the image, then an MLP; each added to its input, of which it reads the norm."""

    def __init__(self, width: int, sees: bool) -> None:
        super().__init__()
        self.own, self.own_in, self.own_out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.sees = sees
        if sees:
            self.image, self.asked, self.shown = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 2 * width)
            self.image_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, state_BLW: Tensor, padding_BL: Tensor, image_BVW: Tensor | None, most: int | None = None) -> Tensor:
        """(B, L, W), or the first `most` places of it."""
        query_BLW, key_BLW, value_BLW = self.own_in(self.own(state_BLW)).chunk(3, dim=-1)
        state_BLW = state_BLW[:, :most] + self.own_out(_attended(query_BLW[:, :most], key_BLW, value_BLW, padding_BL))
        if self.sees:
            key_BVW, value_BVW = self.shown(image_BVW).chunk(2, dim=-1)
            state_BLW = state_BLW + self.image_out(_attended(self.asked(self.image(state_BLW)), key_BVW, value_BVW, None))
        return state_BLW + self.mlp(state_BLW)  # type: ignore[no-any-return]


def _attended(query_BLW: Tensor, key_BKW: Tensor, value_BKW: Tensor, padding_BK: Tensor | None) -> Tensor:
    """(B, L, W), written out: on a GPU fused attention adds up its gradient in an order that changes from run to run."""
    query, key, value = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (query_BLW, key_BKW, value_BKW))
    scores_BHLK = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if padding_BK is not None:
        scores_BHLK = scores_BHLK.masked_fill(padding_BK[:, None, None], _MASKED)
    attended: Tensor = scores_BHLK.softmax(dim=-1) @ value
    return attended.transpose(1, 2).flatten(2)
