#!/usr/bin/env python3
"""Golden conversations, by Jinja (pip install jinja2), set up as transformers does: tests/golden/tokenizer/chat.jsonl

A line for each template and conversation: "family", "template", "messages" (role, content, ...), "text" with bos_token <s> and eos_token </s>.
SmolLM2's, Qwen's and Zephyr's templates are theirs (Apache-2.0, MIT); the Llama and Gemma ones are written here to the same effect.

    tools/make_chat_golden.py QWEN3_TOKENIZER_CONFIG_JSON [FILE]
"""
import json
import pathlib
import sys

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROOT = pathlib.Path(__file__).resolve().parent.parent

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.<|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

PHI3 = r"""{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + '\n' + m['content'] + '<|end|>\n' }}{# <|user|> #}{% endfor %}{{ '<|assistant|>\n' }}"""

LLAMA2 = r"""{% set first = messages[0]['role'] == 'system' %}{% for m in (messages[1:] if first else messages) %}
{%- if first and loop.first %}{% set content = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' + m['content'] %}
{%- else %}{% set content = m['content'] %}{% endif %}
{%- if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

LLAMA3 = r"""{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

LLAMA31 = r"""{{- bos_token }}{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'] | trim, messages[1:] %}
{%- else %}{% set system, rest = '', messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}
{%- for m in rest %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"""

GEMMA3 = r"""{{ bos_token }}{% set first = messages[0]['role'] == 'system' %}{% for m in (messages[1:] if first else messages) %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}{{ messages[0]['content'] + '\n\n' if first and loop.first }}
{{- m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

CONVERSATIONS = [
    ["user", "Hello"],
    ["system", "Be brief.", "user", "Hello\nthere "],
    ["user", "  Hi  ", "assistant", " Hello! ", "user", "And?\n\n"],
    ["system", " You are X. \n", "user", "It's <b>", "assistant", "<think>\nhm\n</think>\n\nyes", "user", "two \u3000", "assistant", "a", "user", "b"],
    ["system", "", "user", "x"],
    ["system", " S ", "user", "\n  x "],
    ["user", ""],
]


def render(template, messages):
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = json.dumps
    return env.from_string(template).render(messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")


def main():
    qwen3 = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))["chat_template"]
    path = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "tests/golden/tokenizer/chat.jsonl"
    families = {"smollm2": SMOLLM2, "qwen2.5": QWEN25, "qwen3": qwen3, "zephyr": ZEPHYR, "phi3": PHI3, "llama2": LLAMA2, "llama3": LLAMA3,
                "llama3.1": LLAMA31, "gemma3": GEMMA3}
    with open(path, "w", encoding="ascii", newline="\n") as file:
        for family, template in families.items():
            for conversation in CONVERSATIONS:
                messages = [{"role": r, "content": c} for r, c in zip(conversation[::2], conversation[1::2])]
                line = {"family": family, "template": template, "messages": conversation, "text": render(template, messages)}
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
