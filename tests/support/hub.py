"""A machine's copy of a model of the Hugging Face hub: its published configuration, without weights, is what plans and dry runs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.tokenizers import qwen2

# config.json of Qwen/Qwen2.5-0.5B. Its tokenizer's words are not needed: the rows of its matrices are vocab_size.
QWEN = {
    **{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "max_position_embeddings": 32768},
    **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
    **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
    **{"bos_token_id": 151643, "eos_token_id": 151643},
}


def cached(folder: Path, name: str = "Qwen/Qwen2.5-0.5B", config: dict[str, Any] = QWEN) -> dict[str, str]:
    """Write a copy of that model; what the environment of a process without a network has to say to find it."""
    model = folder / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("c0ffee", encoding="utf-8")
    snapshot = model / "snapshots" / "c0ffee"
    qwen2().save_pretrained(snapshot)
    (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}
