"""Small tokenizers with the shapes of real families, made in code, and those families' chat templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CORPUS = (
    "What is it? Where does Nora live? Nora has moved to Lisbon and bakes bread. You are brief. "
    "system user assistant INST think tool call Today Date Nov 2026 2024 "
) * 4

_LINES = "It costs 12 crowns.\n\n What is it?\n Today:\n" * 4

QWEN3 = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' and '</think>' in m.content %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- else %}{%- set content = m.content %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
# The prompt opens the thought: R1 distills, Qwen3 thinking models.
R1 = (
    "{{ '<bos>' }}{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{ m.content }}{%- endif %}"
    "{%- if m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}{%- endif %}"
    "{%- if m.role == 'assistant' %}"
    "{{ '<\uff5cAssistant\uff5c>' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\n' }}{%- endif %}"
)
LLAMA32 = (
    "{{- '<bos>' }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{%- endif %}"
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{{- system + '<|im_end|>' }}"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{- m.content | trim + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
_ALTERNATE = (
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}{%- endif %}"
)
# Mistral-7B-Instruct v0.1 and v0.2 as they came: a system message is refused, [INST] is ordinary text.
MISTRAL_V1 = (
    "{{- '<s>' }}" + _ALTERNATE + "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
    "{%- else %}{{- m.content + '</s>' }}{%- endif %}{%- endfor %}"
)
# v0.1 as it is today: the system text goes into the first user turn.
MISTRAL_V1_TODAY = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- '<s>' }}"
    "{%- for m in rest %}{%- if m.role == 'user' %}{%- if loop.first and system is defined %}"
    "{{- ' [INST] ' + system + '\n\n' + m.content + ' [/INST]' }}"
    "{%- else %}{{- ' [INST] ' + m.content + ' [/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m.content + '</s>' }}{%- endif %}{%- endfor %}"
)
# v0.3: [INST] is a control token, and the system text goes into the last user turn.
MISTRAL_V3 = (
    MISTRAL_V1_TODAY.replace("loop.first", "loop.last")
    .replace("' [/INST]'", "'[/INST]'")
    .replace("' [INST] '", "'[INST] '")
)
GEMMA = (
    "{{ '<bos>' }}{%- if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{%- endif %}"
    "{%- for m in messages %}{%- set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"
)

# With tools. Qwen 3: behind the system text; a result in a user turn; an assistant's last turn has a thought.
QWEN3_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{{- '# Tools\n\nCall them so.\n<tools>' }}{%- for t in tools %}{{- '\n' + (t | tojson) }}{%- endfor %}"
    "{{- '\n</tools>\n<tool_call>\n{...}\n</tool_call><|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- elif m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' }}{%- if loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    '{{- m.content }}{%- for c in m.tool_calls or [] %}{{- \'<tool_call>\n{"name": "\' + c.function.name }}'
    "{{- '\", \"arguments\": ' + (c.function.arguments | tojson) + '}\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
# Llama 3.1: in the first user turn, or before the system text; a result as JSON in a turn of its own.
LLAMA31_TOOLS = (
    "{{- '<bos>' }}{%- set here = tools_in_user_message is defined and not tools_in_user_message %}"
    "{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{%- if tools is not none %}{{- 'Environment: ipython\n' }}{%- endif %}"
    "{%- if tools is not none and here %}{{- 'Functions:\n\n' }}"
    "{%- for t in tools %}{{- (t | tojson(indent=4)) + '\n\n' }}{%- endfor %}{%- endif %}"
    "{{- system + '<|im_end|>' }}{%- for m in rest %}"
    "{%- if m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{{- ({'output': m.content} | tojson) + '<|im_end|>' }}{%- elif m.tool_calls %}"
    "{%- if m.tool_calls | length > 1 %}{{- raise_exception('one call at once') }}{%- endif %}"
    "{%- set f = m.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{- '{\"name\": \"' + f.name + '\", \"parameters\": ' + (f.arguments | tojson) + '}<|im_end|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "{{- '<|im_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
# Mistral v0.3: before the last user turn, which has the system text too; ids of nine characters.
MISTRAL_V3_TOOLS = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}"
    "{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}{{- '<s>' }}"
    "{%- for m in rest %}{%- if m.role == 'user' %}"
    "{%- if tools is not none and m == users[-1] %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) }}"
    "{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}{{- '[INST] ' }}"
    "{%- if loop.last and system is defined %}{{- system + '\n\n' }}{%- endif %}{{- m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}"
    "{{- (c.function | tojson)[:-1] }}{%- if c.id | length != 9 %}{{- raise_exception('ids of nine') }}"
    "{%- endif %}{{- ', \"id\": \"' + c.id + '\"}' }}{%- endfor %}{{- ']</s>' }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + m.content }}"
    "{{- ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- else %}{{- ' ' + m.content + '</s>' }}{%- endif %}{%- endfor %}"
)
MISTRAL_CONTROL = (
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)

_SPECIAL = ("<s>", "</s>", "<bos>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<start_of_turn>")
_MORE_SPECIAL = ("<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")
_R1_MARKS = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def byte_level(
    template: str, eos: str = "<|im_end|>", hidden: Sequence[str] = (), takes_lines: bool = False
) -> Any:
    """A tokenizer as Llama 3 and Qwen have: bytes, control tokens that are special, and some that are not.

    ``hidden``: those of ``NOT_SPECIAL`` that are special here, so that a decoder leaves them out.
    ``takes_lines``: a mark takes the line ends behind it into its token, as Qwen's and Llama 3's do.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not takes_lines)
    words = [pre_tokenizers.Split(Regex(_WORDS), "isolated")] if takes_lines else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, bytes_alone])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [CORPUS, _LINES] if takes_lines else [CORPUS],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    special = (*_SPECIAL, *_MORE_SPECIAL, *_R1_MARKS, *hidden)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    backend.add_tokens([AddedToken(name, normalized=False) for name in NOT_SPECIAL if name not in hidden])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token="<bos>", chat_template=template
    )


def sentence_piece(template: str, eos: str = "</s>", control: Sequence[str] = ()) -> Any:
    """A tokenizer as Mistral 7B and Gemma have: words begin with a blank, bytes where a character is unknown.

    ``control``: more control tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *_SPECIAL, *control, *fallback], show_progress=False
    )
    backend.train_from_iterator([CORPUS], trainer)
    state = json.loads(backend.to_str())
    # bytes are words of the vocabulary, and no control tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in fallback]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(name, normalized=False) for name in ("<unk>", *_SPECIAL, *control)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token="<s>", unk_token="<unk>", chat_template=template
    )


def with_dated_template(model: Path, folder: Path) -> Path:
    """Copy a model of SmolLM2's tokenizer, with a template that names the day as Llama 3.2's does."""
    shutil.copytree(model, folder)
    day = "{{ '<|im_start|>system\nToday is ' + strftime_now('%Y-%m-%d') + '.\n\n' }}"
    first = "{{ messages[0].content + '<|im_end|>\n' }}"
    turn = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    rest = "{% for m in messages[1:] %}" + turn + "{% endfor %}"
    reply = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    (folder / "chat_template.jinja").write_text(day + first + rest + reply)
    return folder
