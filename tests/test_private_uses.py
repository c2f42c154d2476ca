"""What megakd uses of other libraries without their promise to keep it: read from the source and compared with the list below.

A name with a leading underscore, wherever it stands; a `ds_*` attribute, which DeepSpeed hangs on parameters; and a name that is imported
from inside a library which does not export it. Each has one module that owns it, so that a new version of the library is one place to look
at, and an upper bound of the library in pyproject.toml.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement

from support.runs import REPOSITORY

# library: what is used, and by which module alone
OWNERS: dict[str, dict[str, str]] = {
    "torch": {
        "_apply": "megakd.models.streaming",
        "_is_vnni_supported": "megakd.models.int8.matmul",
        "_modules": "megakd.models.int8.convert",
        "_non_persistent_buffers_set": "megakd.models.casts",
        "_parameters": "megakd.models.casts",
        "_shutdown_workers": "megakd.data.stream",
        "_workers": "megakd.data.stream",
        "_world": "megakd.runtime.launch",
        "torch._dynamo.callback.on_compile_end": "megakd.runtime.compiler",
        "torch._dynamo.callback.on_compile_start": "megakd.runtime.compiler",
        "torch.ops.onednn": "megakd.models.int8.matmul",
        "torch.utils._python_dispatch.TorchDispatchMode": "megakd.planning.memory_tracker",
        "torch.utils._pytree.tree_flatten": "megakd_kernels.precision",
        "torch.utils._pytree.tree_unflatten": "megakd_kernels.precision",
    },
    "deepspeed": {
        "fp32_partitioned_groups_flat": "megakd.runtime.engine",
        "global_samples": "megakd.runtime.engine",
        "deepspeed.ops.__compatible_ops__": "megakd.runtime.engine",
        "_lazy_init_hp_params_optimizer_state": "megakd.runtime.engine",
        "_ZERO_PARAM_INTRA_PARALLEL_GROUP": "megakd.runtime.engine",
        "deepspeed.comm.comms_logger": "megakd.benchmarks.traffic_side",
        "deepspeed.runtime.config": "megakd.runtime.ds_check",
        "deepspeed.runtime.zero": "megakd.runtime.ds_check",
        "deepspeed.runtime.zero.parameter_offload": "megakd.runtime.engine",
        "deepspeed.runtime.zero.partition_parameters.InsertPostInitMethodToModuleSubClasses": "megakd.runtime.engine",
        "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator": "megakd.runtime.engine",
        "ds_id": "megakd.runtime.engine",
        "ds_opt_adam": "megakd.runtime.engine",
        "ds_persist": "megakd.runtime.zero3",
        "ds_shape": "megakd.runtime.engine",
        "ds_status": "megakd.runtime.zero3",
        "ds_tensor": "megakd.runtime.engine",
    },
    "open_clip_torch": {
        "open_clip.factory._get_hf_config": "megakd.models.clip",
        "open_clip.coca_model.MultimodalCfg": "megakd.models.architecture",
        "open_clip.convert.convert_state_dict": "megakd.models.matching",
        "open_clip.hf_model.HFTextEncoder": "megakd.export.transformers_towers",
        "open_clip.hf_model._POOLERS": "megakd.models.architecture",
        "open_clip.model.resize_pos_embed": "megakd.models.resolution",
        "open_clip.model.resize_text_pos_embed": "megakd.models.matching",
        "open_clip.modified_resnet.AttentionPool2d": "megakd.models.int8.attention",
        "open_clip.modified_resnet.ModifiedResNet": "megakd.models.patches",
        "open_clip.pretrained._clean_tag": "megakd.models.pretrained",
        "open_clip.pretrained.download_pretrained_from_hf": "megakd.models.pretrained",
        "open_clip.timm_model.TimmModel": "megakd.models.patches",
        "open_clip.tokenizer.HFTokenizer": "megakd.models.tokenizing",
        "open_clip.transformer.Attention": "megakd.models.int8.attention",
        "open_clip.transformer.LayerNorm": "megakd.models.casts",
        "open_clip.transformer.LayerNormFp32": "megakd.models.casts",
        "open_clip.transformer.QuickGELU": "megakd.export.transformers_layers",
        "open_clip.transformer.ResidualAttentionBlock": "megakd.export.transformers_layers",
        "open_clip.transformer.TextTransformer": "megakd.export.transformers_towers",
        "open_clip.transformer.VisionTransformer": "megakd.models.patches",
    },
    "transformers": {
        "transformers.masking_utils": "megakd.planning.vlm",
        "transformers.models.auto.tokenization_auto.get_tokenizer_config": "megakd.models.vlm.decoder_tokenizer",
    },
    "bitsandbytes": {"torch.ops.bitsandbytes": "megakd.models.int8.matmul"},
    "peft": {"peft.tuners.lora.LoraLayer": "megakd.models.vlm.lora"},
    "submitit": {
        "_make_submission_file_text": "megakd.jobs.submit",
        "_submitit_command_str": "megakd.jobs.submit",
        "submitit.core.core": "megakd.jobs.submit",
        "submitit.core.utils.FailedJobError": "megakd.jobs.submit",
        "submitit.core.utils.FailedSubmissionError": "megakd.jobs.submit",
    },
    "timm": {
        "init_non_persistent_buffers": "megakd.models.streaming",
        "qkv_bias_separate": "megakd.models.int8.convert",
        "timm.models.vision_transformer.Block": "megakd.export.transformers_layers",
        "timm.models.vision_transformer.VisionTransformer": "megakd.export.transformers_towers",
    },
}
LISTED = {name for names in OWNERS.values() for name in names}
# Of these libraries, a name that is imported from anywhere but here counts. open_clip.transform has the data class that image processing is
# written down in, for every module that handles pictures.
PUBLIC = {
    "deepspeed": ("deepspeed", "deepspeed.ops.adam", "deepspeed.utils", "deepspeed.zero"),
    "open_clip": ("open_clip", "open_clip.transform"),
    "peft": ("peft",),
    "submitit": ("submitit", "submitit.helpers"),
    "timm": ("timm", "timm.data", "timm.layers"),
    "transformers": ("transformers", "transformers.utils"),
}
PRIVATE = re.compile(r"_(?!_)|ds_(id|numel|opt|param|persist|shape|status|tensor)")
OPEN_TO_ALL = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}  # of named tuples, and documented
OURS = {"__future__", "megakd", "megakd_kernels"}
SOURCES = {
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
    for base, package in ((REPOSITORY, "megakd"), (REPOSITORY / "kernels", "megakd_kernels"))
    for path in sorted((base / package).rglob("*.py"))
}


def _private(*names: str) -> bool:
    return any(name in LISTED or (PRIVATE.match(name) and name not in OPEN_TO_ALL) for name in names)


def _inside(module: str) -> bool:
    top = module.split(".")[0]
    return _private(*module.split(".")) or (top in PUBLIC and module not in PUBLIC[top])


def _own(tree: ast.Module) -> set[str]:
    """Names that a module defines: functions, classes, variables, fields and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def _uses(source: str) -> Iterator[str]:
    """Names of libraries that they do not promise to keep, in one module."""
    tree = ast.parse(source)
    own = _own(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases if _inside(alias.name))
            case ast.ImportFrom(module=str(module), names=aliases) if module.split(".")[0] not in OURS | sys.stdlib_module_names:
                names = (alias.name for alias in aliases)
                yield from (f"{module}.{name}" for name in names if _inside(module) or _private(name, f"{module}.{name}"))
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id=top), attr=part), attr=name) if top in PUBLIC:
                if _inside(f"{top}.{part}") or _private(name):
                    yield f"{top}.{part}.{name}"
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="torch"), attr="ops"), attr=name):
                yield f"torch.ops.{name}"
            case ast.Attribute(value=ast.Name(id=("os" | "sys"))):
                pass  # os._exit and sys._current_frames are documented
            case ast.Attribute(attr=name) if _private(name) and name not in own:
                yield name
            case ast.Call(func=ast.Name(id=("getattr" | "hasattr" | "setattr")), args=[_, ast.Constant(value=str(name)), *_]):
                yield from [name] if _private(name) else []


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch.utils._pytree import tree_map", ["torch.utils._pytree.tree_map"]),
        ("from open_clip.factory import load_checkpoint", ["open_clip.factory.load_checkpoint"]),
        ("import open_clip\nopen_clip.factory.load_checkpoint", ["open_clip.factory.load_checkpoint"]),
        ("from torch.nn.modules.batchnorm import _BatchNorm", ["torch.nn.modules.batchnorm._BatchNorm"]),
        ("norm._buffers['x']", ["_buffers"]),
        ("getattr(engine, '_lazy', None)", ["_lazy"]),
        ("parameter.ds_status", ["ds_status"]),
        ("from open_clip import create_model\nimport os\nos._exit(1)\npair._replace(a=1)", []),
        ("class Mine:\n    def __init__(self):\n        self._own = 1\ndef other(mine):\n    return mine._own", []),
    ],
)
def test_every_way_to_reach_into_a_library_is_seen(source: str, uses: list[str]) -> None:
    assert list(_uses(source)) == uses


def test_what_libraries_do_not_promise_is_used_by_the_module_that_owns_it_alone() -> None:
    used = {(name, module) for module, path in SOURCES.items() for name in _uses(path.read_text(encoding="utf-8"))}
    assert used == {(name, owner) for names in OWNERS.values() for name, owner in names.items()}


def _bounded(requirement: Requirement) -> bool:
    return any(part.operator == "<" for part in requirement.specifier)


def test_a_library_has_an_upper_bound_where_private_parts_of_it_are_used_and_nowhere_else() -> None:
    """A bound costs users, too: it keeps them from a version that might well work."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [Requirement(name) for names in (project["dependencies"], *project["optional-dependencies"].values()) for name in names]
    assert {requirement.name for requirement in asked if _bounded(requirement)} == set(OWNERS)
    assert [requirement.name for requirement in asked if requirement.name in OWNERS and not _bounded(requirement)] == []
