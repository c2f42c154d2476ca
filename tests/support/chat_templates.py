"""Chat templates of the kinds that language models have, and tokenizers for them."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from support.tokenizers import byte_pairs, qwen2

# As Qwen2.5's: a system message of its own, and tags around what the assistant says.
CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{%- generation %}{{ message['content'] + '<|im_end|>' }}{%- endgeneration %}{{ '\\n' }}"
    "{%- else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
# As Qwen3's: empty thoughts before the last answer, and before one that is to be given without thinking.
THINKING = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
# As Llama 3's: header ids, trimmed contents, a begin token, a token that ends a turn and is not the tokenizer's end.
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
# As Gemma's: no system message, roles take turns, contents are trimmed.
STRICT = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}"
    "{%- for message in messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{%- endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '\\n' + message['content'] | trim + '<|eot_id|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant\\n' }}{%- endif %}"
)
# As Phi-3's: the end of the text where no answer is asked for.
PHI3 = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- else %}{{ '<|endoftext|>' }}{%- endif %}"
)
# As Llama 2's: no token between question and answer, and white space on both sides of each.
LLAMA2 = (
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{%- else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = template
    return tokenizer


def chatml() -> PreTrainedTokenizerFast:
    return with_template(qwen2(), CHATML)


def llama3() -> PreTrainedTokenizerFast:
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    model = byte_pairs(special)
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")  # Llama 3's but for digits
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokens = {"bos_token": special[0], "eos_token": special[1]}
    more = {"extra_special_tokens": [AddedToken(token, special=True) for token in special[2:]]}
    return with_template(PreTrainedTokenizerFast(tokenizer_object=model, **tokens, **more), LLAMA3)
