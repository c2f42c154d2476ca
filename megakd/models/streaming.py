"""From a file of weights into a model, tensor by tensor: no rank ever holds the whole model.

1. `empty_parameters`: inside it a model is built with its parameters on torch's meta device and its buffers in memory, so that tables
   which a constructor computes (attention masks, rotary tables) have their values. The model is then made int8, still empty.
2. `Match` compares the file's names and shapes with the model's before the first tensor is read.
3. `fill`: the first rank reads a few tensors, quantises them and hands them to every rank, which keeps them or its partition of them.
   The other ranks read nothing: a file is read once, however many ranks there are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megakd.models import casts
from megakd.models import clip as clip_models
from megakd.models.casts import SCALARS
from megakd.models.int8 import convert as int8_towers
from megakd.models.int8 import matmul
from megakd.models.int8.linear import Int8Linear
from megakd.models.int8.migration import Originals
from megakd.models.matching import Match, errors_of
from megakd.models.names import OLD_TEXT
from megakd.models.pretrained import weights_file
from megakd.models.weights import InMemory, Weights, open_weights
from megakd.runtime import collectives
from megakd.runtime.launch import World
from megakd.runtime.precision import Precision

# Handed to the ranks together: fewer collectives, and still less than the largest single tensor of a giant teacher.
BATCH_BYTES = 64 << 20
TEXT = (*OLD_TEXT, "text.")  # in open_clip's two classes of models
Place = Callable[[list[nn.Parameter]], None]
# Tensor of the file -> the names in the model that are made of it -> as what part of it.
Conversions = dict[str, dict[str, int8_towers.Part]]


@dataclass(frozen=True)
class Int8:
    """Options of `convert.quantise`. migrated: `migration.migrate` will follow."""

    outlier_threshold: float = 0.0
    product: matmul.Product | None = None
    migrated: bool = False


def load(
    description: clip_models.ModelSpec,
    world: World,
    precision: Precision,
    *,
    int8: Int8 | None = None,
    place: Place | None = None,
    without_text: bool = False,
) -> clip_models.ClipModel:
    """A frozen model with its weights, which every rank gets from the first one's reading. A collective.

    precision: of everything that is not int8. place: see `fill`. without_text: the text tower is left empty, nothing of it is read.
    `pretrained = "random"` draws from torch's global generator what `clip.build` draws. It can be drawn only as a whole, so the first
    rank then holds the whole model, for int8 until its originals are closed; of a file no rank holds more than a few tensors.
    Raises ValueError on every rank when the weights do not fit the architecture or cannot be read, naming file and tensors.
    """
    try:
        with torch.random.fork_rng(devices=[]), empty_parameters():
            built = clip_models.build(description, torch.device("cpu"), precision, load_weights=False)
    except ValueError as error:
        if not (isinstance(error.__cause__, RuntimeError) and "meta" in str(error.__cause__)):
            raise
        raise ValueError(
            f"{description.role}: this architecture computes with its own weights as it is made (timm's hybrids, ViTamin and Swin v2 do), "
            f"so it cannot be read tensor by tensor; set {description.role}.mode to replicated"
        ) from error
    clip = built.clip.eval().requires_grad_(False)
    expected = {name: tuple(tensor.shape) for name, tensor in clip.state_dict().items()}
    rng_state = torch.get_rng_state()

    def open_match() -> Match:
        with torch.random.fork_rng(devices=[]), errors_of(description.role):
            torch.set_rng_state(rng_state)  # random weights come out the same each time
            if description.settings.pretrained == clip_models.RANDOM:
                drawn = clip_models.build(description, torch.device("cpu"), precision).clip
                weights: Weights = InMemory(drawn.state_dict(), "random weights")
            else:
                weights = open_weights(weights_file(description.settings, download=True))
            return Match(description.role, description.config, clip, expected, weights)

    on_main: list[Match] = []
    collectives.by_main(lambda: on_main.append(open_match()), world)
    match = on_main[0] if world.is_main else None
    if int8 is not None:
        int8_towers.quantise(clip, threshold=int8.outlier_threshold, product=int8.product, migrated=int8.migrated)
        for layer in clip.modules():
            if isinstance(layer, Int8Linear) and layer.factor is not None:
                layer.factor = torch.ones(layer.in_features)  # in no file
    conversions: Conversions = {}
    unique = _Slots(clip).tensors  # without a tied tensor's second name
    for name, source in int8_towers.sources(clip).items():
        if name in unique and not (without_text and name.startswith(TEXT)):
            conversions.setdefault(source.tensor, {})[name] = source.part
    fill(clip, conversions, match, world, place, None if int8 is None else int8.product)
    originals = None
    if int8 is not None:
        made_of = int8_towers.matrices(clip)
        names = {layer: name for layer, name in made_of.items() if not (without_text and name.startswith(TEXT))}
        # Drawing billions of random weights anew takes minutes.
        originals = Originals(names, open_match, world, match if description.settings.pretrained == clip_models.RANDOM else None)
    return replace(built, originals=originals)


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Modules made in here have parameters on the meta device, whatever device they are moved to, and real buffers.

    torch.device("meta") alone would leave buffers empty that no checkpoint has. Constructors register a parameter before they
    initialise it, so nothing is drawn: 5 billion parameters take seconds. Not thread-safe.
    """
    register, apply = nn.Module.register_parameter, nn.Module._apply

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    def apply_type_alone(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def without_device(tensor: Tensor) -> Tensor:
            if tensor.device.type != "meta":
                return fn(tensor)
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype)).dtype)

        moved: nn.Module = apply(self, without_device, recurse)
        return moved

    nn.Module.register_parameter, nn.Module._apply = register_empty, apply_type_alone  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module._apply = register, apply  # type: ignore[method-assign]


class _Slots:
    """The tensors of a model's state by name, a tied one by its first name, and how to put others in their place."""

    def __init__(self, model: nn.Module) -> None:
        names: dict[int, str] = {}
        state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.tensors = {name: tensor for name, tensor in state.items() if names.setdefault(id(tensor), name) == name}
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}  # a tied tensor has several
        for module in model.modules():
            for tensors in (module.named_parameters, module.named_buffers):
                for key, tensor in tensors(recurse=False, remove_duplicate=False):
                    self._owners.setdefault(id(tensor), []).append((module, key))

    def put(self, name: str, value: Tensor) -> Tensor:
        """Returns what is now in the model: a frozen parameter where there was one, else the value."""
        old = self.tensors[name]
        new = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
        for owner, key in self._owners.pop(id(old)):
            setattr(owner, key, new)
        self.tensors[name] = new
        return new


def fill(
    model: nn.Module,
    conversions: Conversions,
    match: Match | None,
    world: World,
    place: Place | None = None,
    product: matmul.Product | None = None,
) -> None:
    """Give an empty model its values. A collective: every rank calls it with the same model and conversions.

    match: on the first rank, which alone reads; None on the others. place: what to do with parameters that have their values on the
    first rank, such as `Partitioner.partition`; default: copy them to every rank. Scale, bias, other parameters without a dimension
    and buffers are always copied to every rank. product: of int8 matrices, see `convert.quantise`.
    Raises ValueError or OSError on every rank when the first cannot read on; the model is then of no use.
    """
    slots = _Slots(model)
    for batch in _batches(conversions, slots.tensors):
        values: dict[str, Tensor] = {}
        collectives.by_main(functools.partial(_read, batch, match, slots, world, values, product), world)
        to_place: list[nn.Parameter] = []
        for name in (name for parts in batch.values() for name in parts):
            old = slots.tensors[name]
            value = values.pop(name) if world.is_main else torch.empty(old.shape, dtype=old.dtype, device=world.device)
            new = slots.put(name, value)
            if place is not None and isinstance(new, nn.Parameter) and new.ndim > 0 and name not in SCALARS:
                to_place.append(new)
            elif world.size > 1:
                dist.broadcast(new.data.reshape(-1).view(torch.uint8), 0)
        if place is not None and to_place:
            place(to_place)
    for module in model.modules():
        _compute_tables(module)
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if buffer.device.type != "meta":
                setattr(module, key, buffer.to(world.device))


def _compute_tables(module: nn.Module) -> None:
    """Compute the buffers that no file has and that the constructor left on meta, as timm's Swin does with its masks."""
    tables = {key: buffer for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False) if buffer.is_meta}
    compute: Any = getattr(module, "init_non_persistent_buffers", None)
    if compute is None or not tables.keys() & casts.computed_buffers(module).keys():
        return
    compute()
    for key, table in module.named_buffers(recurse=False, remove_duplicate=False):
        if key in tables and table.is_floating_point():
            setattr(module, key, table.to(tables[key].dtype))


def _batches(conversions: Conversions, empty: Mapping[str, Tensor]) -> Iterator[Conversions]:
    batch: Conversions = {}
    size = 0
    for source, parts in conversions.items():
        batch[source] = parts
        size += sum(empty[name].nbytes for name in parts)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _read(
    batch: Conversions, match: Match | None, slots: _Slots, world: World, values: dict[str, Tensor], product: matmul.Product | None
) -> None:
    """Put the batch's values into `values`, in the model's types, on the device."""
    assert match is not None
    for source, parts in batch.items():
        made = int8_towers.parts_of(match.read(source).to(world.device), parts.values(), product)
        for name, part in parts.items():
            old = slots.tensors[name]
            assert made[part].shape == old.shape, f"{name}: {tuple(made[part].shape)} made for {tuple(old.shape)}"
            values[name] = made[part].to(old.dtype).contiguous()
