"""More families: older ones, those with merged or alternating roles, marks before the text, and ends of their own."""

# ruff: noqa: E501 - a template is easier to read on one line
from tests.rows.family import ALTERNATE, FIRST_SYSTEM, IM, IM_PROMPT, IM_TOKENS, NO_SYSTEM, SAID, THINKS, Family, turns

COUNT = "{% set ns = namespace(turns=0) %}"
ROLE = "'<|' + m.role + '|>'"
MARKS = ("<|user|>", "<|assistant|>", "<|system|>")

MORE = {
    "alpaca": Family(
        turns("{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}{% else %}{{ ('### Instruction:\\n' if m.role == 'user' else '### Response:\\n') + m.content + "
              "(eos_token if m.role == 'assistant' else '') + '\\n\\n' }}{% endif %}", "'### Response:\\n'"), "</s>",
    ),
    "metharme": Family(
        turns("{{ ('<|model|>' if m.role == 'assistant' else " + ROLE + ") + m.content + (eos_token if m.role == 'assistant' else '') }}", "'<|model|>'"),
        "</s>", ("<|user|>", "<|model|>", "<|system|>"),
    ),
    "openchat, words as marks": Family(
        "{{ bos_token }}" + turns("{{ ('' if m.role == 'system' else 'GPT4 Correct ' + m.role | title + ': ') + m.content + '<|end_of_turn|>' }}", "'GPT4 Correct Assistant:'"),
        "<|end_of_turn|>",
    ),
    "solar, headings as marks": Family(
        turns("{{ '### ' + m.role | title + ':\\n' + m.content + (eos_token if m.role == 'assistant' else '') + '\\n\\n' }}", "'### Assistant:\\n'"), "</s>",
    ),
    "falcon instruct, only blank lines between turns": Family(
        turns("{{ ('\\n\\n' if not loop.first else '') + m.role | title + ': ' + m.content | trim }}", "'\\n\\nAssistant:'"), "<|endoftext|>", divides=True,
    ),
    "blenderbot, texts one after the other": Family(
        "{% for m in messages %}{{ ('  ' if not loop.first else '') + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '  ' }}{% else %}{{ eos_token }}{% endif %}",
        "</s>", divides=True,
    ),
    "minicpm, a mark before each turn and none behind": Family(
        turns("{{ ('<A>' if m.role == 'assistant' else '<U>' if m.role == 'user' else '') + m.content | trim }}", "'<A>'"), "</s>", ("<A>", "<U>"), divides=True,
    ),
    "deepseek v2, words as marks": Family(
        "{{ bos_token }}" + turns("{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}{% elif m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
                                  "{% else %}{{ 'Assistant: ' + m.content + eos_token }}{% endif %}", "'Assistant:'"), "</s>",
    ),
    "ernie 4.5, words as marks behind a beginning of text": Family(
        "{{ bos_token }}" + turns("{{ ('User: ' if m.role == 'user' else 'Assistant: ' if m.role == 'assistant' else '') + m.content + (eos_token if m.role == 'assistant' "
                                  "else '\\n') }}", "'Assistant: '"), "</s>",
    ),
    "tulu 3, a blank line only between turns": Family(
        turns("{{ " + ROLE + " + '\\n' + m.content + ((eos_token + ('' if loop.last else '\\n')) if m.role == 'assistant' else '\\n') }}", "'<|assistant|>\\n'"),
        "<|endoftext|>", MARKS,
    ),
    "olmo 2, the end of text before and behind": Family(
        "{{ eos_token }}" + turns("{{ " + ROLE + " + '\\n' + m.content + ((eos_token + ('' if loop.last else '\\n')) if m.role == 'assistant' else '\\n') }}", "'<|assistant|>\\n'"),
        "<|endoftext|>", MARKS,
    ),
    "h2o danube, no system role": Family(
        turns("{{ ('<|prompt|>' if m.role == 'user' else '<|answer|>') + m.content + eos_token }}", "'<|answer|>'", before=NO_SYSTEM),
        "</s>", ("<|prompt|>", "<|answer|>"), lacks=("system", "second system"),
    ),
    "mistral v1, roles that alternate, no system role": Family(
        "{{ bos_token }}" + COUNT + turns(
            "{% if m.role == 'system' %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}" + ALTERNATE
            + "{{ ' [INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}", "''"),
        "</s>", lacks=("system", "second system", "two users"),
    ),
    "ministral 3, turns of one role merged": Family(
        "{{ bos_token }}" + turns(
            "{% if m.role == 'system' %}{{ '[SYS]' + m.content + '[/SYS]' }}{% elif m.role == 'user' %}{{ ('[INST]' if loop.first or messages[loop.index0 - 1].role != 'user' "
            "else '\\n\\n') + m.content + ('[/INST]' if loop.last or messages[loop.index0 + 1].role != 'user' else '') }}{% else %}{{ m.content + eos_token }}{% endif %}", "''"),
        "</s>", ("[INST]", "[/INST]", "[SYS]", "[/SYS]"),
    ),
    "mistral v7 tekken, a day in a system message of its own": Family(
        "{{ bos_token }}{% if messages[0].role != 'system' %}{{ '[SYS]Today is ' + strftime_now('%Y-%m-%d') + '.[/SYS]' }}{% endif %}" + turns(
            "{% if m.role == 'system' %}{{ '[SYS]' + m.content + '[/SYS]' }}{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}"
            "{% endif %}", "''"),
        "</s>", ("[INST]", "[/INST]", "[SYS]", "[/SYS]"),
    ),
    "magistral, thoughts between marks of their own": Family(
        "{{ bos_token }}" + turns(
            "{% if m.role == 'system' %}{{ '[SYS]' + m.content + '[/SYS]' }}{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{% set t = " + THINKS + " %}"
            "{{ ('[THINK]' + t + '[/THINK]' if t else '') + " + SAID + " + eos_token }}{% endif %}", "''"),
        "</s>", ("[INST]", "[/INST]", "[SYS]", "[/SYS]", "[THINK]", "[/THINK]"),
    ),
    "gemma 3n, roles that alternate, system in the first turn": Family(
        "{{ bos_token }}" + FIRST_SYSTEM + COUNT + turns(
            "{% if m.role == 'system' and loop.first %}{% else %}{% if m.role == 'system' %}{{ raise_exception('System role not supported here') }}{% endif %}" + ALTERNATE
            + "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (sys + '\\n\\n' if sys and ns.turns == 1 else '') + m.content | trim + '<end>\\n' }}{% endif %}",
            "'<turn>model\\n'"),
        "<eos>", ("<turn>", "<end>"), ("<end>",), lacks=("second system", "two users"),
    ),
    "phi-3 mini, the first version, without system messages": Family(
        "{{ bos_token }}" + turns("{% if m.role == 'user' %}{{ '<|user|>\\n' + m.content + '<|end|>\\n<|assistant|>\\n' }}{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\\n' }}"
                                  "{% endif %}", "''"),
        "<|endoftext|>", (*MARKS, "<|end|>"), ("<|end|>",), lacks=("system", "second system"),
    ),
    "phi-3.5, a system message, the end of text at the end": Family(
        turns("{{ " + ROLE + " + '\\n' + m.content + '<|end|>\\n' }}", "'<|assistant|>\\n'", after="{{ eos_token }}"),
        "<|endoftext|>", (*MARKS, "<|end|>"), ("<|end|>",),
    ),
    "phi-4 mini, no line between mark and text": Family(
        turns("{{ " + ROLE + " + m.content + '<|end|>' }}", "'<|assistant|>'", after="{{ eos_token }}"),
        "<|endoftext|>", (*MARKS, "<|end|>"), ("<|end|>",),
    ),
    "exaone 3.5, an end for answers and system messages only": Family(
        "{% if messages[0].role != 'system' %}{{ '[|system|][|end|]\\n' }}{% endif %}" + turns(
            "{{ '[|' + m.role + '|]' + m.content + ('\\n' if m.role == 'user' else '[|end|]' if loop.last else '[|end|]\\n') }}", "'[|assistant|]'"),
        "[|end|]", ("[|user|]", "[|assistant|]", "[|system|]"),
    ),
    "glm 4, marks before the text and before each turn": Family(
        "[gMASK]<sop>" + turns("{{ " + ROLE + " + '\\n' + m.content }}", "'<|assistant|>\\n'"), "<|endoftext|>", ("[gMASK]", "<sop>", *MARKS), ("<|user|>",),
    ),
    "hunyuan, a mark behind the system message": Family(
        turns("{{ m.content + '<|sys_end|>' if m.role == 'system' else '<|user|>' + m.content if m.role == 'user' else '<|assistant|>' + m.content + eos_token }}", "'<|assistant|>'",
              before="<|begin|>"),
        "<|eos|>", ("<|user|>", "<|assistant|>", "<|sys_end|>", "<|begin|>"),
    ),
    "internlm 2, a beginning of text": Family("{{ bos_token }}" + turns(IM, IM_PROMPT), specials=IM_TOKENS),
    "smollm 2, a system message of its own": Family(
        turns("{% if loop.first and messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are S.<|im_end|>\\n' }}{% endif %}" + IM, IM_PROMPT), specials=IM_TOKENS,
    ),
    "olmo 3, a system message of its own without an end of line": Family(
        turns("{{ '<|im_start|>' + m.role + '\\n' + m.content + ('<|im_end|>\\n' if not loop.last or m.role != 'assistant' else eos_token) }}", IM_PROMPT,
              before="{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are O.<|im_end|>\\n' }}{% endif %}"),
        "<|endoftext|>", ("<|im_start|>", "<|im_end|>"), ("<|im_end|>",), divides=True,
    ),
    "seed-oss, thoughts between marks of their own": Family(
        turns("{{ '<s>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% set t = " + THINKS + " %}{{ ('<seed:think>' + t + '</seed:think>' if t else '') + " + SAID + " }}{% else %}"
              "{{ m.content }}{% endif %}{{ eos_token }}", "'<s>assistant\\n'"),
        "<seed:eos>",
    ),
    "jamba, marks of beginning and end of each message": Family(
        "{{ bos_token }}" + turns("{{ '<|bom|>' + " + ROLE + " + ' ' + m.content + '<|eom|>' }}", "'<|bom|><|assistant|>'"),
        "<|eom|>", ("<|bom|>", *MARKS),
    ),
    "nemotron nano 2, a word of the user's turns thoughts off": Family(
        "{% set ns = namespace(on=true) %}{% for m in messages %}{% if '/no_think' in m.content %}{% set ns.on = false %}{% endif %}{% endfor %}" + turns(
            "{{ '<SPECIAL>' + m.role | title + '\\n' + (" + SAID + " if m.role == 'assistant' and not loop.last else m.content) + ('<END>\\n' if m.role == 'assistant' else '\\n') }}",
            "'<SPECIAL>Assistant\\n' + ('<think>\\n' if ns.on else '<think></think>')"),
        "</s>", ("<SPECIAL>", "<END>"), ("<END>",), divides=True,
    ),
    "minimax m2, the prompt opens a thought, another mark a role": Family(
        turns("{{ ']~b]' + {'assistant': 'ai'}.get(m.role, m.role) + '\\n' }}{% if m.role == 'assistant' %}{% set t = " + THINKS + " %}"
              "{{ ('<think>\\n' + t + '\\n</think>\\n\\n' if t and loop.last else '') + " + SAID + " }}{% else %}{{ m.content }}{% endif %}{{ '[e~[\\n' }}", "']~b]ai\\n<think>\\n'"),
        "[e~[", ("]~b]",), divides=True,
    ),
    "qwq, the prompt opens a thought that only the last answer keeps": Family(
        turns("{{ '<|im_start|>' + m.role + '\\n' + (" + SAID + " if m.role == 'assistant' and not loop.last else m.content) + '<|im_end|>\\n' }}", "'<|im_start|>assistant\\n<think>\\n'"),
        specials=IM_TOKENS, divides=True,
    ),
    "command r plus, roles that alternate": Family(
        "{{ bos_token }}" + COUNT + turns(ALTERNATE + "{{ '<|T|>' + " + ROLE + " + m.content | trim + '<|/T|>' }}", "'<|T|><|assistant|>'"),
        "<|/T|>", ("<|T|>", *MARKS), lacks=("two users",),
    ),
    "aya, a system message first, others as they come": Family(
        "{{ bos_token }}" + turns("{{ '<|T|>' + ('<|assistant|>' if m.role == 'assistant' else " + ROLE + ") + m.content + '<|/T|>' }}", "'<|T|><|assistant|>'"),
        "<|/T|>", ("<|T|>", *MARKS),
    ),
    "stablelm, the end of text and a line behind each turn": Family(
        turns("{{ " + ROLE + " + '\\n' + m.content + '<|endoftext|>\\n' }}", "'<|assistant|>\\n'"), "<|endoftext|>", MARKS,
    ),
    "falcon 3, system and user with the same end": Family(
        turns("{{ " + ROLE + " + '\\n' + m.content + ('\\n' if m.role != 'assistant' else eos_token if loop.last else eos_token + '\\n') }}", "'<|assistant|>\\n'"),
        "<|endoftext|>", MARKS,
    ),
    "granite without a date": Family(
        turns("{{ '<|r|>' + m.role + '<|/r|>' + m.content + eos_token + '\\n' }}", "'<|r|>assistant<|/r|>'"), "<|eot|>", ("<|r|>", "<|/r|>"),
    ),
}  # fmt: skip
