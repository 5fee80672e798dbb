"""Chat templates of real families, written anew and small: each does what its family does with turns and ends."""

# ruff: noqa: E501 - a template is easier to read on one line
from tests.rows.family import DATE, FIRST_SYSTEM, IM, IM_PROMPT, IM_TOKENS, NO_SYSTEM, SAID, THOUGHT, Family, turns
from tests.rows.more_families import MORE
from tests.rows.tool_families import WITH_TOOLS

FAMILIES = {
    **WITH_TOOLS,
    **MORE,
    "chatml": Family(turns(IM, IM_PROMPT), specials=IM_TOKENS),
    "qwen2.5, a system message of its own": Family(
        turns(IM, IM_PROMPT, before="{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Q.<|im_end|>\n{% endif %}"),
        specials=IM_TOKENS,
    ),
    "qwen3, no thoughts in earlier turns": Family(
        turns(
            "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.last %}"
            "{% set t = " + THOUGHT + " %}{{ '<think>\\n' + t + '\\n</think>\\n\\n' }}{% endif %}"
            "{{ " + SAID + " if m.role == 'assistant' else m.content }}{{ '<|im_end|>\\n' }}",
            IM_PROMPT,
        ),
        specials=IM_TOKENS, divides=True,
    ),
    "qwen3 without thinking": Family(
        turns(
            "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}"
            "{% endif %}{{ m.content + '<|im_end|>\\n' }}",
            IM_PROMPT + " + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '')",
        ),
        specials=IM_TOKENS, divides=True, variables=(("enable_thinking", False),),
    ),
    "qwen3.5, the prompt opens a thought": Family(
        turns(
            "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.last %}"
            "{% set t = " + THOUGHT + " %}{{ '<think>\\n' + t + '\\n</think>\\n\\n' }}{% endif %}"
            "{{ " + SAID + " if m.role == 'assistant' else m.content }}{{ '<|im_end|>\\n' }}",
            "'<|im_start|>assistant\\n<think>\\n'",
        ),
        specials=IM_TOKENS, divides=True,
    ),
    "nemotron, an empty thought written and one opened": Family(
        turns(
            "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{{ m.content if '</think>' in m.content "
            "else '<think></think>' + m.content }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}",
            "'<|im_start|>assistant\\n<think>\\n'",
        ),
        specials=IM_TOKENS, divides=True,
    ),
    "llama 3": Family(
        turns("{{ '<|h|>' + m.role + '<|/h|>\\n\\n' + m.content | trim + '<|eot|>' }}", "'<|h|>assistant<|/h|>\\n\\n'",
              before="{{ bos_token }}"),
        "<|eot|>", ("<|h|>", "<|/h|>"),
    ),
    "llama 3.1, today's date": Family(
        turns("{{ '<|h|>' + m.role + '<|/h|>\\n\\n' + m.content | trim + '<|eot|>' }}", "'<|h|>assistant<|/h|>\\n\\n'",
              before=DATE + "{{ bos_token + '<|h|>system<|/h|>\\n\\nToday: ' + day + '<|eot|>' }}"),
        "<|eot|>", ("<|h|>", "<|/h|>"),
    ),
    "llama 2": Family(
        FIRST_SYSTEM + "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ('<<SYS>>\\n' + sys + "
        "'\\n<</SYS>>\\n\\n' if sys and loop.index0 <= 1 else '') + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
        "{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>", lacks=("second system",),
    ),
    "phi-3, the end of text at the very end": Family(
        turns("{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}", "'<|assistant|>\\n'", after="{{ eos_token }}"),
        "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>"), ("<|end|>",),
    ),
    "phi-3 on a base that stops at the end of text only": Family(
        turns("{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}", "'<|assistant|>\\n'", after="{{ eos_token }}"),
        "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>"), divides=True,
    ),
    "phi-4, the first system message only": Family(
        turns("{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endif %}",
              "'<|im_start|>assistant<|im_sep|>'",
              before="{% if messages[0].role == 'system' %}{{ '<|im_start|>system<|im_sep|>' + messages[0].content + "
              "'<|im_end|>' }}{% endif %}"),
        specials=("<|im_start|>", "<|im_sep|>"), lacks=("second system",),
    ),
    "gemma, no system role": Family(
        turns("{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end>\\n' }}",
              "'<turn>model\\n'", before="{{ bos_token }}" + NO_SYSTEM),
        "<eos>", ("<turn>", "<end>"), ("<end>",), lacks=("system", "second system"),
    ),
    "gemma 3, system in the first turn": Family(
        FIRST_SYSTEM + turns(
            "{% if m.role != 'system' %}{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (sys + '\\n\\n' "
            "if sys and m.role == 'user' and loop.index0 <= 1 else '') + m.content | trim + '<end>\\n' }}{% endif %}",
            "'<turn>model\\n'", before="{{ bos_token }}"),
        "<eos>", ("<turn>", "<end>"), ("<end>",), lacks=("second system",),
    ),
    "gemma 4, the prompt closes an empty thought": Family(
        turns("{{ '<|turn>' + m.role + '\\n' + m.content + '<turn|>\\n' }}",
              "'<|turn>assistant\\n' + ('' if enable_thinking | default(false) else '<|channel>thought\\n<channel|>')"),
        "<eos>", ("<|turn>", "<turn|>", "<|channel>", "<channel|>"), ("<turn|>",), divides=True,
    ),
    "mistral, system in the first turn": Family(
        FIRST_SYSTEM + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + (sys + '\\n\\n' if sys and "
        "loop.index0 <= 1 else '') + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
        "{% endif %}{% endfor %}",
        "</s>", ("[INST]", "[/INST]"), lacks=("second system",),
    ),
    "mistral v3, system in the last turn": Family(
        FIRST_SYSTEM + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + (sys + '\\n\\n' if sys and "
        "loop.last else '') + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
        "{% endif %}{% endfor %}",
        "</s>", ("[INST]", "[/INST]"), lacks=("second system",),
    ),
    "mistral tekken, a mark for the system": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '[SYS]' + m.content + '[/SYS]' }}"
        "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
        "{% endfor %}",
        "</s>", ("[INST]", "[/INST]", "[SYS]", "[/SYS]"),
    ),
    "deepseek r1, drops thoughts and opens one": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<A>' + m.content.split('</think>')[-1] + "
        "eos_token }}{% elif m.role == 'user' %}{{ '<U>' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<A><think>\\n' }}{% endif %}",
        "</s>", ("<A>", "<U>"), divides=True,
    ),
    "deepseek v3.1, the prompt closes a thought": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<A></think>' + m.content.split('</think>')[-1] + "
        "eos_token }}{% elif m.role == 'user' %}{{ '<U>' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<A>' + ('<think>' if thinking | default(false) else '</think>') }}{% endif %}",
        "</s>", ("<A>", "<U>"), lacks=("thoughts",),
    ),
    "exaone 4, drops thoughts": Family(
        turns("{{ '[|' + m.role + '|]\\n' + (" + SAID + ") + '[|end|]\\n' }}", "'[|assistant|]\\n'"),
        "[|end|]", ("[|user|]", "[|assistant|]", "[|system|]"), lacks=("thoughts",),
    ),
    "glm 4.5, the next turn's mark ends an answer": Family(
        turns("{{ '<|' + m.role + '|>\\n' + m.content }}", "'<|assistant|>\\n'"),
        "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>"), ("<|user|>",),
    ),
    "glm on a base that stops at the end of text only": Family(
        turns("{{ '<|' + m.role + '|>\\n' + m.content }}", "'<|assistant|>\\n'"),
        "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>"), divides=True,
    ),
    "llava, nothing at the end": Family(
        turns("{{ {'user': 'USER: ', 'assistant': ' ASSISTANT:', 'system': ''}[m.role] + (' ' if m.role == 'assistant' else '')"
              " + m.content }}", "' ASSISTANT:'"),
        "</s>", divides=True,
    ),
    "vicuna": Family(
        turns("{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + "
              "m.content + eos_token }}{% else %}{{ m.content + '\\n\\n' }}{% endif %}", "'ASSISTANT:'"),
        "</s>",
    ),
    "zephyr": Family(
        turns("{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}", "'<|assistant|>\\n'"), "</s>",
    ),
    "gpt-oss, another end for the last answer": Family(
        turns("{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' "
              "if loop.last else '<|end|>') }}{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
              "{% endif %}", "'<|start|>assistant'"),
        "<|return|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>"), divides=True,
    ),
    "granite, today's date": Family(
        turns("{{ '<|r|>' + m.role + '<|/r|>' + m.content + eos_token + '\\n' }}", "'<|r|>assistant<|/r|>'",
              before="{{ '<|r|>system<|/r|>Today is ' + strftime_now('%B %d, %Y') + '.' + eos_token + '\\n' }}"),
        "<|eot|>", ("<|r|>", "<|/r|>"),
    ),
    "smollm 3, date and a switch for thoughts": Family(
        turns("{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + ('' if '</think>' in m.content else "
              "'<think>\\n\\n</think>\\n') + m.content + '<|im_end|>\\n' }}{% else %}" + IM + "{% endif %}",
              IM_PROMPT + " + ('' if enable_thinking | default(true) else '<think>\\n\\n</think>\\n')",
              before="{{ '<|im_start|>system\\n' + strftime_now('%d %B %Y') + '<|im_end|>\\n' }}"),
        specials=IM_TOKENS,
    ),
    "command r": Family(
        turns("{{ '<|T|><|' + m.role + '|>' + m.content | trim + '<|/T|>' }}", "'<|T|><|assistant|>'",
              before="{{ bos_token }}"),
        "<|/T|>", ("<|T|>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "falcon h1, the first system message only": Family(
        turns("{% if m.role != 'system' or loop.first %}" + IM + "{% endif %}", IM_PROMPT),
        specials=IM_TOKENS, lacks=("second system",),
    ),
    "one that counts the messages": Family(
        turns("{{ '<' + m.role + '>' + m.content + eos_token }}", "'<assistant>'", before="{{ messages | length }}"),
        "</s>", divides=True,
    ),
}  # fmt: skip
