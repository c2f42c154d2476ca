"""Image and text towers of open_clip as parts of transformers' CLIPModel and SiglipModel, by the modules that they are made of.

Which tower fits which class is decided by the layers that are there, not by a model's name: timm's Vision Transformers of CLIP have a norm
before their blocks and a class token, those of SigLIP pool by attention and have neither.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from megakd.export.transformers_layers import NotMapped, Part, activation, put_blocks
from megakd.models.image_only import ImageModel, ImageTower
from megakd.models.patches import OPEN_CLIP_TIMM, OPEN_CLIP_VIT, image_size


def vision_part(visual: Any) -> Part:
    """The image tower. Raises NotMapped with the layer that transformers has not."""
    height, width = image_size(visual)
    if height != width:
        raise NotMapped(f"its images are {height} x {width} pixels, and transformers' CLIP and SigLIP take squares")
    if isinstance(visual, OPEN_CLIP_VIT):
        part = _of_open_clip(visual)
    elif isinstance(visual, OPEN_CLIP_TIMM | ImageTower):
        if not isinstance(visual.trunk, TimmViT):
            raise NotMapped(f"its image tower is timm's {type(visual.trunk).__name__}, and transformers' CLIP and SigLIP have a ViT")
        part = _of_timm(visual.trunk, _projection_of(visual))
    else:
        raise NotMapped(f"its image tower is {type(visual).__name__}, and transformers' CLIP and SigLIP have a ViT")
    part.settings |= {"image_size": width}
    return part.finish()


def _of_open_clip(visual: Any) -> Part:
    part = Part("clip")
    if isinstance(visual.ln_pre, nn.Identity):
        raise NotMapped("its image tower has no norm before its blocks (no_ln_pre), which CLIPVisionModel has")
    if visual.attn_pool is not None or visual.pool_type != "tok":
        pool = "attention" if visual.attn_pool is not None else visual.pool_type
        raise NotMapped(f"its image tower pools by {pool}, and CLIPVisionModel by the class token")
    part.state["embeddings.class_embedding"] = visual.class_embedding.detach()
    part.state["embeddings.position_embedding.weight"] = visual.positional_embedding.detach()
    part.put("embeddings.patch_embedding", visual.conv1)
    part.put("pre_layrnorm", visual.ln_pre)  # transformers' own spelling
    put_blocks(part, visual.transformer.resblocks)
    part.put("post_layernorm", visual.ln_post)
    part.settings["patch_size"] = _square(visual.patch_size)
    part.head = visual.proj.detach().T.contiguous()
    return part


def _of_timm(trunk: Any, projection: Tensor | None) -> Part:
    for name in ("fc_norm", "head"):
        if not isinstance(getattr(trunk, name), nn.Identity):
            raise NotMapped(f"timm's tower ends with a {type(getattr(trunk, name)).__name__} ({name}), which transformers' has not")
    if trunk.reg_token is not None or trunk.pos_embed is None or isinstance(trunk.norm, nn.Identity):
        missing = "register tokens" if trunk.reg_token is not None else "no learned positions, or no last norm"
        raise NotMapped(f"timm's tower has {missing}")
    if not isinstance(trunk.patch_embed.norm, nn.Identity):
        raise NotMapped("timm's tower normalises its patches")
    part = _as_clip(trunk, projection) if trunk.attn_pool is None else _as_siglip(trunk, projection)
    part.put("embeddings.patch_embedding", trunk.patch_embed.proj)
    put_blocks(part, trunk.blocks)
    part.put("post_layernorm", trunk.norm)
    part.settings["patch_size"] = _square(trunk.patch_embed.patch_size)
    return part


def _as_clip(trunk: Any, projection: Tensor | None) -> Part:
    part = Part("clip")
    if trunk.cls_token is None or trunk.global_pool != "token" or trunk.no_embed_class:
        raise NotMapped(f"timm's tower pools by {trunk.global_pool or 'nothing'}, and CLIPVisionModel by a class token with a position")
    if isinstance(trunk.norm_pre, nn.Identity):
        raise NotMapped("timm's tower has no norm before its blocks (norm_pre), which CLIPVisionModel has; those named *_clip_* have one")
    if trunk.patch_embed.proj.bias is not None:
        raise NotMapped("timm's tower adds a bias to its patches, and CLIPVisionModel none")
    part.state["embeddings.class_embedding"] = trunk.cls_token.detach().reshape(-1)
    part.state["embeddings.position_embedding.weight"] = trunk.pos_embed.detach()[0]
    part.put("pre_layrnorm", trunk.norm_pre)
    part.head = torch.eye(trunk.embed_dim) if projection is None else projection
    return part


def _as_siglip(trunk: Any, projection: Tensor | None) -> Part:
    part, pool = Part("siglip"), trunk.attn_pool
    if projection is not None:
        raise NotMapped("timm's tower pools by attention and is projected after it (timm_proj), and SiglipVisionModel has no projection")
    if trunk.cls_token is not None or not isinstance(trunk.norm_pre, nn.Identity) or trunk.patch_embed.proj.bias is None:
        raise NotMapped("timm's tower pools by attention and has a class token, a norm before its blocks, or patches without a bias")
    known = isinstance(pool, AttentionPoolLatent) and isinstance(pool.q, nn.Linear) and isinstance(pool.q_norm, nn.Identity)
    if (
        not known
        or pool.pos_embed is not None
        or pool.latent_len != 1
        or pool.mlp is None
        or pool.num_heads != trunk.blocks[0].attn.num_heads
    ):
        raise NotMapped(f"timm's {type(pool).__name__} is not SigLIP's: one latent, the blocks' heads, an MLP, no positions")
    if pool.mlp.fc1.out_features != trunk.blocks[0].mlp.fc1.out_features:
        raise NotMapped("the MLP of timm's pooling has another width than those of its blocks")
    part.state["embeddings.position_embedding.weight"] = trunk.pos_embed.detach()[0]
    part.state["head.probe"] = pool.latent.detach()
    part.state["head.attention.in_proj_weight"] = torch.cat([pool.q.weight, pool.kv.weight]).detach()
    part.state["head.attention.in_proj_bias"] = torch.cat([pool.q.bias, pool.kv.bias]).detach()
    part.put("head.attention.out_proj", pool.proj)
    part.put("head.layernorm", pool.norm)
    part.put("head.mlp.fc1", pool.mlp.fc1)
    part.put("head.mlp.fc2", pool.mlp.fc2)
    part.activations.add(activation(pool.mlp.act))
    return part


def _projection_of(visual: Any) -> Tensor | None:
    """The matrix behind timm's tower, (D, width); None where there is none."""
    if isinstance(visual, ImageTower):
        return None
    layers = dict(visual.head.named_children())
    layers.pop("drop", None)
    projection = layers.pop("proj", None)
    if layers:
        raise NotMapped(f"behind timm's tower is a {type(next(iter(layers.values()))).__name__}, and in transformers one matrix")
    if projection is None:
        return None
    if projection.bias is not None:
        raise NotMapped("the projection behind timm's tower has a bias (timm_proj_bias), and transformers' has none")
    return projection.weight.detach()  # type: ignore[no-any-return]


def text_part(clip: nn.Module, end: int) -> Part:
    """The text tower. end: the token at whose output a text is read. Raises NotMapped with the layer that transformers has not."""
    if isinstance(clip, ImageModel):
        raise NotMapped("it has no text tower")
    if not isinstance(clip, CLIP | CustomTextCLIP):
        raise NotMapped(f"it is open_clip's {type(clip).__name__}, whose text tower does more than CLIP's")
    text: Any = getattr(clip, "text", clip)
    if isinstance(text, HFTextEncoder):
        raise NotMapped(f"its text tower is transformers' {type(text.transformer).__name__} with open_clip's pooling and projection")
    if isinstance(text, TextTransformer) and text.cls_emb is not None:
        raise NotMapped("its text tower appends a class token (embed_cls)")
    pool = text.pool_type if isinstance(text, TextTransformer) else text.text_pool_type
    causal, projection = text.attn_mask is not None, text.text_projection
    if projection is None:
        raise NotMapped("its text tower has no projection")
    weight = projection.weight.detach() if isinstance(projection, nn.Linear) else projection.detach().T.contiguous()
    bias = projection.bias.detach() if isinstance(projection, nn.Linear) and projection.bias is not None else None
    if causal and pool in ("argmax", "eos"):
        part = Part("clip", head=weight)
        if bias is not None and bool(bias.any()):
            raise NotMapped("the projection of its texts has a bias (proj_bias), and CLIPModel's has none")
        eos = text.eos_id if isinstance(text, TextTransformer) else text.text_eos_id
        if pool == "eos" and (eos == 2 or eos != end):
            raise NotMapped(f"its texts are read at token {eos} (eos_id), and transformers takes 2 for the largest token of a text")
        part.settings["eos_token_id"] = end
    elif not causal and pool == "last":
        part = Part("siglip")
        part.state |= {"head.weight": weight, "head.bias": torch.zeros(weight.shape[0]) if bias is None else bias}
        part.settings["projection_size"] = weight.shape[0]
    else:
        raise NotMapped(
            f"its text tower is {'causal' if causal else 'not causal'} and pools by {pool!r}; CLIPModel's is causal and reads the end "
            f"token, SiglipModel's is not and reads the last one"
        )
    part.put("embeddings.token_embedding", text.token_embedding)
    part.state["embeddings.position_embedding.weight"] = text.positional_embedding.detach()
    put_blocks(part, text.transformer.resblocks)
    part.put("final_layer_norm", text.ln_final)
    words, positions = text.token_embedding.num_embeddings, text.positional_embedding.shape[0]
    part.settings |= {"vocab_size": words, "max_position_embeddings": positions}
    return part.finish()


def _square(patch: Any) -> int:
    height, width = patch if isinstance(patch, tuple | list) else (patch, patch)
    if height != width:
        raise NotMapped(f"its patches are {height} x {width} pixels, and transformers' are squares")
    return int(height)
