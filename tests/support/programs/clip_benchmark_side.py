"""What CLIP_benchmark itself makes of retrieval sets; run in an environment that has it (`support.library_environments.CLIP_BENCHMARK`).

python clip_benchmark_side.py table N            prints its recalls of `embeddings(N)`
python clip_benchmark_side.py write FOLDER       writes a retrieval set in its layout
python clip_benchmark_side.py score FOLDER MODEL scores that with an open_clip model's folder, and prints its recalls
python clip_benchmark_side.py classify FOLDER MODEL scores its class folders zero-shot, by open_clip's names and templates of ImageNet
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

IMAGES, CUTOFFS = 30, [1, 5, 10]


def embeddings(seed: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Images (N, D), texts (T, D) near their images, and the image of each text: one to seven an image. Unit rows."""
    draw = np.random.RandomState(seed)  # its stream is fixed for good
    of = [image for image in range(IMAGES) for _ in range(1 + draw.randint(7))]
    images = torch.from_numpy(draw.standard_normal((IMAGES, 6))).float()
    texts = images[of] + 0.9 * torch.from_numpy(draw.standard_normal((len(of), 6))).float()
    return torch.nn.functional.normalize(images, dim=-1), torch.nn.functional.normalize(texts, dim=-1), of


class Looked(torch.nn.Module):
    """Embeddings in the place of images and texts."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def encode_text(self, texts: torch.Tensor) -> torch.Tensor:
        return texts


def named(found: dict[str, float]) -> dict[str, dict[str, float]]:
    """By our names: its image retrieval looks for the image of a text."""
    ways = {"image_to_text": "text_retrieval", "text_to_image": "image_retrieval"}
    return {ours: {f"R@{cutoff}": found[f"{theirs}_recall@{cutoff}"] for cutoff in CUTOFFS} for ours, theirs in ways.items()}


def table(seed: int) -> dict[str, Any]:
    from clip_benchmark.metrics import zeroshot_retrieval

    images, texts, of = embeddings(seed)
    rows = range(IMAGES)
    batches = [
        (images[start : start + 8], [[text for text, own in enumerate(of) if own == row] for row in rows[start : start + 8]])
        for start in range(0, IMAGES, 8)
    ]
    found = zeroshot_retrieval.evaluate(Looked(), batches, lambda rows: texts[rows], "cpu", amp=False, recall_k_list=CUTOFFS)
    return named(found)


def write(folder: Path) -> None:
    """Pictures of noise, each with one to five captions, by its own converter."""
    from clip_benchmark.webdataset_builder import PIL_to_bytes, convert_retrieval_dataset

    draw, words = np.random.RandomState(0), ("red", "blue", "green", "circle", "square", "star", "a", "small", "large", "above", "left")
    pairs = []
    for _ in range(50):
        image = Image.fromarray(draw.randint(0, 255, (40, 48, 3)).astype(np.uint8))
        captions = [" ".join(words[place] for place in draw.randint(len(words), size=6)) for _ in range(1 + draw.randint(5))]
        pairs.append((image, captions))
    convert_retrieval_dataset(pairs, "test", str(folder), transform=PIL_to_bytes("png"), image_format="png", max_count=20, verbose=False)


def score(folder: Path, model_folder: str) -> dict[str, Any]:
    import open_clip
    from clip_benchmark.datasets.builder import build_wds_dataset
    from clip_benchmark.metrics import zeroshot_retrieval

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
    dataset = build_wds_dataset("set", preprocess, "test", str(folder)).batched(16)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=0)
    tokenize = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    found = zeroshot_retrieval.evaluate(model.eval(), loader, tokenize, "cpu", amp=False, recall_k_list=CUTOFFS)
    return named(found)


def classify(folder: Path, model_folder: str) -> dict[str, float]:
    import open_clip
    from clip_benchmark.metrics import zeroshot_classification
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
    from timm.data import ImageNetInfo
    from torchvision.datasets import ImageFolder

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
    images = ImageFolder(str(folder), preprocess)
    known = ImageNetInfo("imagenet-1k").label_names()
    names = [IMAGENET_CLASSNAMES[known.index(name)] for name in images.classes]
    templates = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
    loader = torch.utils.data.DataLoader(images, batch_size=16, num_workers=0)
    tokenize = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    classifier = zeroshot_classification.zero_shot_classifier(model.eval(), tokenize, names, templates, "cpu", amp=False)
    logits, target = zeroshot_classification.run_classification(model, classifier, loader, "cpu", amp=False)
    # what its `evaluate` makes of them; its own `accuracy` gives float() an array of one number, which numpy refuses from 2.4 on
    top = {f"top{most}": top_k_accuracy_score(target, logits, k=most, labels=range(len(names))) for most in (1, 5)}
    return {**top, "mean_per_class_recall": balanced_accuracy_score(target, logits.argmax(axis=1))}


if __name__ == "__main__":
    what, *names = sys.argv[1:]
    if what == "write":
        write(Path(names[0]))
    elif what == "classify":
        print("RECALLS " + json.dumps(classify(Path(names[0]), names[1])))
    else:
        print("RECALLS " + json.dumps(table(int(names[0])) if what == "table" else score(Path(names[0]), names[1])))
