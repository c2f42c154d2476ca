"""Low-rank adapters in a language model, by peft. The vision tower and the projector are not given to peft."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel

from megakd.recipe import Lora

WEIGHTS_FILE = "adapter_model.safetensors"
_SHOWN = 3
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
    names = leaf_names(linear_layers(language))
    for target in settings.targets:
        if target not in names:
            raise ValueError(f"decoder.lora.targets: {target!r} is no linear layer of this language model; it has {', '.join(names)}")


def linear_layers(language: PreTrainedModel) -> Iterator[str]:
    """Names of the layers that can be adapted: all linear ones but the output layer, which may be tied to the embeddings.

    A model's own class of linear layer is left out: it may return more than a product, as PhiMoE's router does.
    """
    output = language.get_output_embeddings()
    for name, module in language.named_modules():
        own = type(module).__module__.startswith("transformers.models.")
        if isinstance(module, nn.Linear | Conv1D) and not own and module is not output:
            yield name


def leaf_names(layers: Iterable[str]) -> list[str]:
    """The last parts of layers' names, as `decoder.lora.targets` takes them."""
    return sorted({name.rpartition(".")[2] for name in layers})


def with_lora(language: PreTrainedModel, settings: Lora) -> Any:
    """`language` with adapters, its own weights frozen. Its outputs are unchanged: the second factor starts at zero."""
    from peft import LoraConfig, get_peft_model

    layers = sorted(linear_layers(language))
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=layers if settings.targets == "linear" else list(settings.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(language, config)
    except ValueError as error:  # layers whose weight some classes read by themselves, Mamba's output projection for example
        if "lora_dropout" in str(error):  # of experts that are one tensor
            raise ValueError(f"decoder.lora.dropout = {settings.dropout}: peft has none for this model ({error}); set it to 0.0") from error
        others = [leaf for leaf in leaf_names(layers) if repr(leaf) not in str(error)]
        raise ValueError(f"decoder.lora.targets: peft does not take them all ({error}); set them to {others}") from error


def coverage(language: Any) -> str:
    """A sentence for the log: how much of a language model the adapters cover, and what is not covered, by name.

    Matrices between embeddings and output layer are counted; a tensor of experts counts as one matrix for each. Mixtral's experts are no
    layers that could be adapted, and hold nearly all of its weights.
    """
    from peft.tuners.lora import LoraLayer

    plain = language.get_base_model()
    output = plain.get_output_embeddings()
    layers = [module for module in plain.modules() if isinstance(module, LoraLayer)]
    adapted = {id(getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))) for layer in layers}
    covered_matrices = matrices = covered_weights = weights = 0
    missed: dict[str, int] = {}
    for name, module in plain.named_modules():
        if isinstance(module, nn.Embedding) or module is output or ".lora_" in name:
            continue
        for own, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2:
                continue
            count = weight.shape[0] if weight.ndim == 3 and not isinstance(module, nn.Conv1d | nn.ConvTranspose1d) else 1
            matrices, weights = matrices + count, weights + weight.numel()
            if id(weight) in adapted:
                covered_matrices, covered_weights = covered_matrices + count, covered_weights + weight.numel()
            else:
                kind = re.sub(r"\.\d+(?=\.|$)", ".*", f"{name}.{own}".replace(_WRAPPED, ""))
                missed[kind] = missed.get(kind, 0) + weight.numel()
    largest = sorted(missed, key=lambda kind: -missed[kind])
    shown = ", ".join(largest[:_SHOWN]) + (f" and {len(largest) - _SHOWN} more kinds" if len(largest) > _SHOWN else "")
    text = f"LoRA on {covered_matrices} of {matrices} matrices, {100 * covered_weights / max(weights, 1):.3g} % of their weights"
    return text + (f"; not covered: {shown}" if shown else "")


class Watch:
    """Which adapters a backward has reached since it was made."""

    def __init__(self, language: nn.Module) -> None:
        self._reached: dict[str, bool] = {}
        self._handles = []
        for name, parameter in language.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                layer = name.split(".lora_B")[0].rpartition("base_model.model.")[2]
                group = re.sub(r"experts\.\d+\.", "experts.*.", layer)
                self._reached.setdefault(group, False)
                self._handles.append(parameter.register_hook(functools.partial(self._note, group)))

    def _note(self, group: str, gradient: Tensor) -> None:
        self._reached[group] = True

    def close(self) -> dict[str, bool]:
        """By layer, whether its adapters got a gradient. A layer's experts are one entry, since few are chosen at once."""
        for handle in self._handles:
            handle.remove()
        return self._reached


def refuse_unreached(reached: dict[str, bool], language: Any) -> None:
    """Raises ValueError for adapters without a gradient: the model's code reads a layer's weight and does not call the layer."""
    unreached = [name for name, has_gradient in reached.items() if not has_gradient]
    if not unreached:
        return
    others = [leaf for leaf in leaf_names(reached) if leaf not in leaf_names(unreached)]
    shown, name = ", ".join(unreached[:_SHOWN]), type(language.get_base_model()).__name__
    raise ValueError(
        f"decoder.lora.targets: no gradient reaches the adapters of {shown}{', ...' if len(unreached) > _SHOWN else ''} ({len(unreached)} "
        f"layers), which {name} does not call; {f'set them to {others}' if others else 'set decoder.adapt to none or full'}"
    )


def finite_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError naming the file for one that cannot be read, and for NaN or infinity in it."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy it again, or write it anew by resuming its run") from error
    for name, value in weights.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} holds NaN or infinity; take an earlier checkpoint of the run that wrote it")
    return weights


def load_adapter(language: Any, folder: Path) -> None:
    """Put the adapter that peft wrote to `folder` into `language`, made by `with_lora`.

    Raises ValueError when its weights are not exactly those of `language`'s adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    stored, own = finite_weights(folder / WEIGHTS_FILE), get_peft_model_state_dict(language)
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
