"""A bundle gives the same answers after it is saved, loaded, merged or gone on from; half a bundle or a changed one is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from megakd import recipe
from megakd.cli import vqa
from megakd.export.bundle import Bundle, merge
from megakd.export.warm_start import warm_start
from megakd.models import clip
from megakd.models.vlm.decoder import DecoderModel
from support import edit_json
from support.decoders import CPU, make_decoder, make_towers

LORA = recipe.Lora(rank=4, alpha=8.0, dropout=0.0)
QUESTIONS = ["how many squares are there ?", "is there a red circle ?", "what shape is blue ?"]


def _images() -> list[Image.Image | None]:
    """Of other sizes and modes than the tower's; one is missing."""
    return [Image.new("RGB", (48, 32), "red"), None, Image.new("L", (20, 90), 200)]


def _stir(module: nn.Module) -> None:
    """As if it had been trained: random weights answer all alike, and adapters start at zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                scale = 0.5 if "lora" in name else 0.1
                parameter.copy_(3 * parameter + scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> Path:
    return world / "tokenizer"


@pytest.fixture(scope="module")
def language(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model on disk, as a run that trains a decoder on text leaves it."""
    module = make_decoder(tokenizer, None, adapt="full")
    _stir(module.language)
    folder = tmp_path_factory.mktemp("language") / "language"
    module.write_language(folder)
    return folder


def _make(tokenizer: Path, *, sees: bool = True, **settings: object) -> Bundle:
    built = make_towers(tokenizer) if sees else None
    named = None if "model" in settings else tokenizer
    module = make_decoder(named, None if built is None else built.clip.visual, lora=LORA, **settings)  # type: ignore[arg-type]
    _stir(nn.ModuleList([part for name, part in module.named_modules() if "lora" in name or name == "projector"]))
    return Bundle(module, built, 64)


@pytest.fixture(scope="module")
def adapted(tokenizer: Path, language: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """Adapters on a language model known by reference, the tower inside."""
    made = _make(tokenizer, model=str(language))
    folder = tmp_path_factory.mktemp("run") / "bundle"
    made.save(folder, tower_inside=True)
    return made, folder


def _answers(one: Bundle) -> list[str]:
    return one.answer(_images(), QUESTIONS, 6)


@pytest.mark.parametrize("case", ["adapter", "architecture", "full", "frozen", "blind"])
def test_a_loaded_bundle_has_the_weights_and_answers_of_the_one_saved(case: str, tokenizer: Path, language: Path, tmp_path: Path) -> None:
    settings = {
        "adapter": {"model": str(language)},
        "architecture": {},
        "full": {"model": str(language), "adapt": "full"},
        "frozen": {"model": str(language), "adapt": "none"},
        "blind": {"model": str(language), "sees": False},
    }[case]
    made = _make(tokenizer, **settings)  # type: ignore[arg-type]
    made.save(tmp_path / "bundle", tower_inside=True)
    loaded = Bundle.load(tmp_path / "bundle", CPU)
    saved = made.decoder.state_dict()
    assert {name: torch.equal(value, saved[name]) for name, value in loaded.decoder.state_dict().items()} == dict.fromkeys(saved, True)
    assert _answers(loaded) == _answers(made)
    assert (tmp_path / "bundle" / "language").is_dir() == (case in ("architecture", "full"))
    assert (tmp_path / "bundle" / "adapter").is_dir() == (case in ("adapter", "architecture", "blind"))


def test_answers_depend_on_the_image_and_not_on_the_batch(adapted: tuple[Bundle, Path]) -> None:
    made, _ = adapted
    images, questions = [*_images(), None], [*QUESTIONS, QUESTIONS[0]]
    together = made.answer(images, questions, 6)
    assert together == [made.answer([image], [question], 6)[0] for image, question in zip(images, questions, strict=True)]
    assert together[0] != together[3]


def test_the_tower_in_a_bundle_is_one_that_open_clip_loads(adapted: tuple[Bundle, Path]) -> None:
    made, folder = adapted
    assert made.towers is not None
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder / 'tower'}")
    own = made.towers.clip.visual.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(value, own[name]) for name, value in model.visual.state_dict().items())


@pytest.mark.parametrize("name", ["projector.safetensors", "adapter/adapter_model.safetensors", "tower/open_clip_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_partial_or_changed_bundle_is_refused_by_file_name(name: str, damage: str, adapted: tuple[Bundle, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapted[1], tmp_path / "bundle"))
    if damage == "missing":
        (folder / name).unlink()
    else:
        weights = load_file(folder / name)
        first = min(weights)
        save_file({**weights, first: weights[first] + 1}, folder / name)
    with pytest.raises(ValueError, match=f"{name} is {'missing' if damage == 'missing' else 'not what was written'}"):
        Bundle.load(folder, CPU)


def test_a_file_that_came_in_later_is_refused(adapted: tuple[Bundle, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapted[1], tmp_path / "bundle"))
    (folder / "README.md").write_text("where it comes from", encoding="utf-8")
    Bundle.load(folder, CPU)
    (folder / "tokenizer" / "added_tokens.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer/added_tokens\.json was not written with it"):
        Bundle.load(folder, CPU)


def test_another_language_model_in_the_place_of_the_base_is_refused(tokenizer: Path, language: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(language, tmp_path / "base"))
    _make(tokenizer, model=str(base)).save(tmp_path / "bundle", tower_inside=True)
    weights = load_file(base / "model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is another one now"):
        Bundle.load(tmp_path / "bundle", CPU)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="is not on this machine"):
        Bundle.load(tmp_path / "bundle", CPU)


def test_a_loaded_tower_is_known_by_reference_and_a_changed_one_is_refused(tokenizer: Path, language: Path, tmp_path: Path) -> None:
    first, folder = _make(tokenizer, model=str(language)), tmp_path / "first"
    first.save(folder, tower_inside=True)
    copied = Path(shutil.copytree(folder / "tower", tmp_path / "tower"))
    built = clip.build(clip.resolve(recipe.Model(model=f"local-dir:{copied}"), "student"), CPU)
    second = Bundle(first.decoder, built, 64)
    second.save(tmp_path / "second", tower_inside=False)
    assert not (tmp_path / "second" / "tower").exists()
    assert _answers(Bundle.load(tmp_path / "second", CPU)) == _answers(first)
    fresh = make_decoder(None, built.clip.visual, model=str(language), lora=LORA)  # type: ignore[arg-type]
    warm_start(tmp_path / "second", fresh, built.description)
    with pytest.raises(ValueError, match="trained on another vision tower"):
        warm_start(tmp_path / "second", fresh, make_towers(tokenizer).description)
    weights = load_file(copied / "open_clip_model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, copied / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"vision tower .* is not here, or another one"):
        Bundle.load(tmp_path / "second", CPU)


def test_a_tower_that_was_named_by_a_relative_path_is_found_from_anywhere(
    tokenizer: Path, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _make(tokenizer, model=str(language))
    made.save(tmp_path / "first", tower_inside=True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tokenizer, tmp_path / "words")
    named = recipe.Model(model="local-dir:first/tower", tokenizer="words", recipe=None)
    built = clip.build(clip.resolve(named, "student"), CPU)
    Bundle(made.decoder, built, 64).save(Path("second"), tower_inside=False)
    monkeypatch.chdir("/")
    assert _answers(Bundle.load(tmp_path / "second", CPU)) == _answers(made)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(ValueError, match=r"second: its vision tower cannot be found"):
        Bundle.load(tmp_path / "second", CPU)


def test_a_random_tower_cannot_be_known_by_reference(tokenizer: Path, language: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of weights that a bundle could refer to"):
        _make(tokenizer, model=str(language)).save(tmp_path / "bundle", tower_inside=False)
    assert not (tmp_path / "bundle").exists()


def test_saving_replaces_a_bundle_and_never_another_folder(adapted: tuple[Bundle, Path], tmp_path: Path) -> None:
    made, _ = adapted
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="holds something else than a bundle"):
        made.save(tmp_path / "mine", tower_inside=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    for _ in range(2):
        made.save(tmp_path / "bundle", tower_inside=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "mine"]


def test_a_folder_without_manifest_and_a_damaged_manifest_are_refused(adapted: tuple[Bundle, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no bundle, it has no bundle\.json"):
        Bundle.load(tmp_path, CPU)
    folder = Path(shutil.copytree(adapted[1], tmp_path / "bundle"))
    text = (folder / "bundle.json").read_text(encoding="utf-8")
    (folder / "bundle.json").write_text(text[:100], encoding="utf-8")
    with pytest.raises(ValueError, match=r"bundle\.json: damaged"):
        Bundle.load(folder, CPU)
    (folder / "bundle.json").write_text(text, encoding="utf-8")
    edit_json(folder / "bundle.json", format=99)
    with pytest.raises(ValueError, match="format 99"):
        Bundle.load(folder, CPU)


def test_a_merged_bundle_needs_nothing_else_and_answers_the_same(tokenizer: Path, language: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(language, tmp_path / "base"))
    made = _make(tokenizer, model=str(base))
    made.save(tmp_path / "bundle", tower_inside=True)
    merge(tmp_path / "bundle", tmp_path / "merged")
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "bundle")
    merged = Bundle.load(tmp_path / "merged", CPU)
    assert not merged.decoder.adapted
    assert _answers(merged) == _answers(made)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "language", dtype=torch.float32)
    ids = torch.randint(5, 60, (2, 7))
    torch.testing.assert_close(plain(input_ids=ids).logits, made.decoder.language(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_merged_language_model_has_the_bases_precision_and_its_end_token(tokenizer: Path, language: Path, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(language, dtype=torch.bfloat16)
    base = Path(shutil.copytree(language, tmp_path / "base"))
    half.save_pretrained(base)
    made = _make(tokenizer, model=str(base))
    made.save(tmp_path / "bundle", tower_inside=True)
    merge(tmp_path / "bundle", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "language")
    assert {weight.dtype for weight in load_file(tmp_path / "merged" / "language" / "model.safetensors").values()} == {torch.bfloat16}
    assert merged.generation_config.eos_token_id == made.decoder.tokenizer.eos_token_id


def test_a_quantised_base_is_loaded_quantised_and_merged_in_full_precision(tokenizer: Path, language: Path, tmp_path: Path) -> None:
    made = _make(tokenizer, model=str(language), quantise="nf4")
    made.save(tmp_path / "bundle", tower_inside=True)
    assert _answers(Bundle.load(tmp_path / "bundle", CPU)) == _answers(made)
    merge(tmp_path / "bundle", tmp_path / "merged")
    merged, layer = Bundle.load(tmp_path / "merged", CPU), "model.layers.0.self_attn.q_proj"
    assert merged.decoder.settings.quantise == "none"
    first, second = (made.decoder.language.get_submodule(f"base_model.model.{layer}.lora_{side}.default").weight for side in "AB")
    expected = load_file(language / "model.safetensors")[f"{layer}.weight"] + LORA.alpha / LORA.rank * second @ first
    torch.testing.assert_close(merged.decoder.language.get_submodule(layer).weight, expected)


def test_a_bundle_answers_with_its_language_model_in_bf16(adapted: tuple[Bundle, Path]) -> None:
    loaded = Bundle.load(adapted[1], CPU, torch.bfloat16)
    assert loaded.decoder.language.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert all(isinstance(answer, str) for answer in _answers(loaded))


def _fresh(tokenizer: Path, **settings: object) -> DecoderModel:
    return _make(tokenizer, **settings).decoder  # type: ignore[arg-type]


def test_a_run_goes_on_from_the_projector_and_adapter_of_a_bundle(adapted: tuple[Bundle, Path], tokenizer: Path, language: Path) -> None:
    made, folder = adapted
    fresh = make_decoder(None, make_towers(tokenizer).clip.visual, model=str(language), lora=LORA)  # type: ignore[arg-type]
    warm_start(folder, fresh, make_towers(tokenizer).description)
    saved = made.decoder.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in fresh.state_dict().items())


def test_an_aligned_projector_is_gone_on_with_under_a_new_adapter(tokenizer: Path, language: Path, tmp_path: Path) -> None:
    aligned = _make(tokenizer, model=str(language), adapt="none")
    aligned.save(tmp_path / "bundle", tower_inside=True)
    fresh = make_decoder(None, make_towers(tokenizer).clip.visual, model=str(language), lora=LORA)  # type: ignore[arg-type]
    warm_start(tmp_path / "bundle", fresh, make_towers(tokenizer).description)
    assert aligned.decoder.projector is not None
    assert fresh.projector is not None
    saved = aligned.decoder.projector.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in fresh.projector.state_dict().items())
    assert all(not value.any() for name, value in fresh.state_dict().items() if "lora_B" in name)


def test_going_on_with_other_parts_is_an_error_that_names_the_key(adapted: tuple[Bundle, Path], tokenizer: Path, language: Path) -> None:
    folder, model = adapted[1], str(language)
    seen = make_towers(tokenizer).description
    with pytest.raises(ValueError, match=r"set decoder\.model = "):
        warm_start(folder, _fresh(tokenizer), seen)
    with pytest.raises(ValueError, match="has no eyes"):
        warm_start(folder, _fresh(tokenizer, model=model, sees=False), None)
    with pytest.raises(ValueError, match=r"decoder\.adapt = 'none' has no place for it"):
        warm_start(folder, _fresh(tokenizer, model=model, adapt="none"), seen)
    narrow = make_decoder(None, make_towers(tokenizer).clip.visual, model=model, lora=LORA.model_copy(update={"rank": 2}))  # type: ignore[arg-type]
    for setting in ({"layer": -1}, {"image_tokens": 1}):
        name, value = next(iter(setting.items()))
        with pytest.raises(ValueError, match=rf"trained with decoder\.{name} = .* this run has {value}"):
            warm_start(folder, _fresh(tokenizer, model=model, **setting), seen)
    with pytest.raises(ValueError, match=r"decoder\.lora\.rank"):
        warm_start(folder, narrow, seen)


def test_the_command_prints_the_bundles_answer(adapted: tuple[Bundle, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, folder = adapted
    picture = Image.new("RGB", (48, 32), "red")
    picture.save(tmp_path / "red.png")
    vqa.run(folder, tmp_path / "red.png", QUESTIONS[0], 6)
    printed = capsys.readouterr().out
    assert printed == made.answer([picture], [QUESTIONS[0]], 6, short=True)[0] + "\n"
    assert printed.strip()


def test_the_commands_mistakes_name_the_file(adapted: tuple[Bundle, Path], tmp_path: Path) -> None:
    folder = adapted[1]
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    cases = {
        "nowhere.jpg: cannot be read": (folder, tmp_path / "nowhere.jpg", "what ?"),
        "torn.jpg: corrupt_image": (folder, tmp_path / "torn.jpg", "what ?"),
        "no bundle": (tmp_path, None, "what ?"),
        "the question is empty": (folder, None, " "),
        r"question 0, .*answers\.max_length = 64": (folder, None, "is there a red circle ? " * 40),
    }
    for message, (where, image, question) in cases.items():
        with pytest.raises(ValueError, match=message):
            vqa.run(where, image, question)
