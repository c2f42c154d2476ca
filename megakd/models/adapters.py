"""Low-rank adapters in a language model, through peft. The vision tower and the projector are outside of what peft is given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from megakd.recipe import Lora

WEIGHTS_FILE = "adapter_model.safetensors"
_WRAPPED = ".base_layer"  # peft moves an adapted layer's own weights one name down


def check(settings: Lora, language: PreTrainedModel) -> None:
    """Raises ValueError when peft is missing or a target is no linear layer of `language`, which may be on the meta device."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "decoder.adapt = 'lora' needs peft: `pip install peft` (or -e '.[vlm]' in the repository), or set it to 'none' or 'full'"
        ) from error
    if settings.targets == "linear":
        return
    if not settings.targets:
        raise ValueError("decoder.lora.targets = []: name layers, write 'linear' for all, or set decoder.adapt to 'none'")
    names = sorted({name.rpartition(".")[2] for name in linear_layers(language)})
    for target in settings.targets:
        if target not in names:
            raise ValueError(f"decoder.lora.targets: {target!r} is no linear layer of this language model; it has {', '.join(names)}")


def linear_layers(language: PreTrainedModel) -> Iterator[str]:
    """Names of the layers that can be adapted: all linear ones but the output layer, which may be tied to the embeddings."""
    output = language.get_output_embeddings()
    for name, module in language.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not output:
            yield name


def with_lora(language: PreTrainedModel, settings: Lora) -> Any:
    """`language` with adapters, its own weights frozen. What it computes is unchanged: the second factor starts at zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=sorted(linear_layers(language)) if settings.targets == "linear" else list(settings.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(language, config)


def load_adapter(language: Any, folder: Path) -> None:
    """Put the adapter that peft wrote to `folder` into `language`, made by `with_lora`.

    Raises ValueError when its weights are not exactly those of `language`'s adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    stored, own = load_file(folder / WEIGHTS_FILE), get_peft_model_state_dict(language)
    wrong = {name for name in stored.keys() | own.keys() if name not in stored or name not in own or stored[name].shape != own[name].shape}
    if wrong:
        raise ValueError(
            f"{folder}: its adapter is not that of decoder.lora and the language model ({len(wrong)} weights differ in name or shape, for "
            f"example {min(wrong)}): set decoder.lora.rank and targets as in the run that wrote it"
        )
    set_peft_model_state_dict(language, stored)


def own_weights(language: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a language model under its own names, whether or not adapters are in it; without the adapters."""
    state = language.state_dict()
    return {name.replace(_WRAPPED, ""): value for name, value in state.items() if ".lora_" not in name}
