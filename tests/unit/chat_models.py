"""Folders of three kinds of reasoning models: tokenizer files and a chat template with their rendering of texts.

The templates are our own: they write for system, user and assistant turns what these families' templates write.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_bvpo.rehearsal.tiny_tokenizers import write_tokenizer

_CHATML = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' + m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}TAIL{%- endif %}"
)
HYBRID = _CHATML.replace(
    "TAIL",
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}",
)
THINKING = _CHATML.replace("TAIL", "{{- '<think>\n' }}")
R1 = (
    "{{- bos_token }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{- m.content }}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}{%- endif %}"
    "{%- if m.role == 'assistant' %}"
    "{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}"
)
R1_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")

# Our name → ms-swift's template, chat template.
FAMILIES = {
    "hybrid": ("qwen3", HYBRID),
    "thinking": ("qwen3_thinking", THINKING),
    "r1": ("deepseek_r1", R1),
}


def write_chat_model(folder: Path, family: str, corpus=("What is 2+2? The answer is 4.\n\nIt is so. " * 4,)) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json and the family's chat template."""
    from tokenizers import AddedToken, Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, vocab="trimmed", vocab_size=400, corpus=corpus)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": FAMILIES[family][1]}
    if family == "r1":
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        first = tokenizer.get_vocab_size()
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in R1_TOKENS])
        tokenizer.save(str(folder / "tokenizer.json"))
        config["added_tokens_decoder"] |= {
            str(first + i): {"content": text, "special": True, "normalized": False} for i, text in enumerate(R1_TOKENS)
        }
        config |= {"bos_token": {"__type": "AddedToken", "content": R1_TOKENS[0]}, "eos_token": R1_TOKENS[1]}
    path.write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    return folder
