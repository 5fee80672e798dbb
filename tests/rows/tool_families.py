"""Families whose templates write schemas of tools, calls and results, each in its own way."""

# ruff: noqa: E501 - a template is easier to read on one line
from tests.rows.family import (
    ALTERNATE,
    CALL,
    CALLS,
    FIRST_SYSTEM,
    IM_PROMPT,
    IM_RESULTS,
    IM_TOKENS,
    IM_TOOLS,
    IS_FIRST_RESULT,
    IS_LAST_RESULT,
    LAST_QUERY,
    SAID,
    SCHEMAS,
    THINKS,
    Family,
    turns,
)

NOT_FIRST_SYSTEM = "{% if not (m.role == 'system' and loop.first) %}"
IM_TOOL_TURN = "{% if m.role == 'tool' %}" + IM_RESULTS + "{% elif m.role == 'assistant' %}"
IM_OTHER = "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endif %}"
IM_SPOKEN = "{{ '<|im_start|>assistant\\n' + m.content }}" + CALLS + "{{ '<|im_end|>\\n' }}"
LATER_THOUGHTS = (  # thoughts are written behind the user's last message only
    "{% set t = " + THINKS + " %}{{ '<|im_start|>assistant\\n' }}{% if loop.index0 > ns.last and (loop.last or t) %}"
    "{{ '<think>\\n' + t + '\\n</think>\\n\\n' }}{% endif %}{{ " + SAID + " }}" + CALLS + "{{ '<|im_end|>\\n' }}"
)
XML_CALLS = (  # Qwen 3 Coder: arguments as elements, through a macro
    "{% macro element(name, value) %}{{ '<parameter=' + name + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}{% endmacro %}"
)
LLAMA = "'<|h|>' + m.role + '<|/h|>\\n\\n'"
LLAMA_TOKENS = ("<|h|>", "<|/h|>", "<|eom|>")
LLAMA_CALL = "{'name': c.function.name, 'parameters': c.function.arguments} | tojson"

WITH_TOOLS = {
    "qwen 2.5, tools in the system message, results grouped": Family(
        turns(NOT_FIRST_SYSTEM + IM_TOOL_TURN + IM_SPOKEN + IM_OTHER, IM_PROMPT, before=IM_TOOLS),
        specials=IM_TOKENS,
    ),
    "qwen 2.5 for training, answers in generation blocks": Family(
        turns(NOT_FIRST_SYSTEM + IM_TOOL_TURN + "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m.content }}" + CALLS
              + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}" + IM_OTHER, IM_PROMPT, before=IM_TOOLS),
        specials=IM_TOKENS,
    ),
    "qwen 3, thoughts after the last message of the user": Family(
        turns(NOT_FIRST_SYSTEM + IM_TOOL_TURN + LATER_THOUGHTS + IM_OTHER, IM_PROMPT, before=LAST_QUERY + IM_TOOLS),
        specials=IM_TOKENS, divides=True,
    ),
    "qwen 3 thinking 2507, the prompt opens a thought": Family(
        turns(NOT_FIRST_SYSTEM + IM_TOOL_TURN + LATER_THOUGHTS + IM_OTHER, "'<|im_start|>assistant\\n<think>\\n'",
              before=LAST_QUERY + IM_TOOLS),
        specials=IM_TOKENS, divides=True,
    ),
    "qwen 3.5, a prompt that closes the thought": Family(
        turns(NOT_FIRST_SYSTEM + IM_TOOL_TURN + LATER_THOUGHTS + IM_OTHER,
              "'<|im_start|>assistant\\n<think>\\n' + ('\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '')",
              before=LAST_QUERY + IM_TOOLS),
        specials=IM_TOKENS, divides=True, variables=(("enable_thinking", False),), lacks=("thoughts",),
    ),
    "qwen 3 coder, calls as elements": Family(
        XML_CALLS + turns(
            NOT_FIRST_SYSTEM + IM_TOOL_TURN + "{{ '<|im_start|>assistant\\n' + m.content }}{% for c in m.tool_calls or [] %}"
            "{{ '\\n<tool_call>\\n<function=' + c.function.name + '>\\n' }}{% for k, v in c.function.arguments.items() %}{{ element(k, v) }}"
            "{% endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}" + IM_OTHER, IM_PROMPT, before=IM_TOOLS),
        specials=IM_TOKENS,
    ),
    "qwen 3 vl, content as text or parts": Family(
        "{% macro said(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p.text }}{% endfor %}{% endif %}{% endmacro %}" + turns(
            NOT_FIRST_SYSTEM + IM_TOOL_TURN + "{{ '<|im_start|>assistant\\n' + said(m.content) }}" + CALLS + "{{ '<|im_end|>\\n' }}"
            "{% elif m.role == 'user' %}{{ '<|im_start|>user\\n' + said(m.content) + '<|im_end|>\\n' }}{% endif %}{% endif %}",
            IM_PROMPT, before=IM_TOOLS),
        specials=IM_TOKENS, lacks=("second system",),
    ),
    "hermes 3, calls and results in turns of a tool": Family(
        turns(NOT_FIRST_SYSTEM + "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'tool' %}{{ '<tool_response>\\n' + m.content + "
              "'\\n</tool_response>' }}{% else %}{{ m.content }}{% endif %}" + CALLS + "{{ '<|im_end|>\\n' }}{% endif %}",
              IM_PROMPT, before=IM_TOOLS),
        specials=IM_TOKENS,
    ),
    "llama 3.1, schemas with the user's first message, one call a turn": Family(
        "{{ bos_token }}" + FIRST_SYSTEM + "{{ '<|h|>system<|/h|>\\n\\n' + sys + '<|eot|>' }}{% set ns = namespace(told=false) %}" + turns(
            "{% if m.role == 'system' and loop.first %}{% elif m.role == 'tool' %}{{ '<|h|>ipython<|/h|>\\n\\n' + (m.content | tojson) + '<|eot|>' }}"
            "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
            "{% set c = m.tool_calls[0] %}{{ " + LLAMA + " + (" + LLAMA_CALL + ") + '<|eot|>' }}{% elif m.role == 'user' and tools and not ns.told %}"
            "{% set ns.told = true %}{{ " + LLAMA + " + 'Given the functions' }}" + SCHEMAS + "{{ '\\n\\n' + m.content | trim + '<|eot|>' }}"
            "{% else %}{{ " + LLAMA + " + m.content | trim + '<|eot|>' }}{% endif %}", "'<|h|>assistant<|/h|>\\n\\n'"),
        "<|eot|>", LLAMA_TOKENS, ("<|eom|>",),
    ),
    "llama 4, calls between marks of Python": Family(
        "{{ bos_token }}" + turns(
            "{% if m.role == 'tool' %}{{ '<|h|>ipython<|/h|>\\n\\n' + (m.content | tojson) + '<|eot|>' }}{% else %}{{ " + LLAMA + " + m.content | trim }}"
            "{% if m.tool_calls %}{{ '<|python_start|>' }}{% for c in m.tool_calls %}{{ " + LLAMA_CALL + " }}{% endfor %}{{ '<|python_end|>' }}{% endif %}"
            "{{ '<|eot|>' }}{% endif %}", "'<|h|>assistant<|/h|>\\n\\n'",
            before="{% if tools %}{{ '<|h|>system<|/h|>\\n\\nTools:' }}" + SCHEMAS + "{{ '<|eot|>' }}{% endif %}"),
        "<|eot|>", (*LLAMA_TOKENS, "<|python_start|>", "<|python_end|>"),
    ),
    "mistral v3, schemas before the last message of the user": Family(
        FIRST_SYSTEM + "{{ bos_token }}" + turns(
            "{% if m.role == 'user' %}{% if tools and loop.index0 == (messages | map(attribute='role') | list | length - 1 - (messages | map(attribute='role') "
            "| list | reverse | list).index('user')) %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}{{ '[INST]' + (sys + '\\n\\n' if sys and loop.last "
            "else '') + m.content + '[/INST]' }}{% elif m.role == 'tool' %}{{ '[RESULTS]' + {'content': m.content} | tojson + '[/RESULTS]' }}"
            "{% elif m.tool_calls %}{{ '[CALLS][' }}{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}"
            "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}{{ " + CALL + " + ('' if loop.last else ', ') }}{% endfor %}"
            "{{ ']' + eos_token }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}", "''"),
        "</s>", ("[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "[CALLS]", "[RESULTS]", "[/RESULTS]"), lacks=("second system",),
    ),
    "mistral small 3.2, a system message of its own and roles that alternate": Family(
        "{{ bos_token }}{% set ns = namespace(turns=0) %}{% if messages[0].role != 'system' %}{{ '[SYS]You are M.[/SYS]' }}{% endif %}"
        "{% if tools %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}" + turns(
            "{% if not m.tool_calls %}" + ALTERNATE + "{% endif %}"
            "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% elif m.role == 'system' %}{{ '[SYS]' + m.content + '[/SYS]' }}"
            "{% elif m.role == 'tool' %}{{ '[RESULTS]' + m.content + '[/RESULTS]' }}{% else %}{{ m.content }}{% for c in m.tool_calls or [] %}"
            "{{ '[CALLS]' + c.function.name + '[ARGS]' + c.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endif %}", "''"),
        "</s>", ("[INST]", "[/INST]", "[SYS]", "[/SYS]", "[TOOLS]", "[/TOOLS]", "[CALLS]", "[ARGS]", "[RESULTS]", "[/RESULTS]"),
        lacks=("two users",),
    ),
    "command r7b, an action or a response": Family(
        "{{ bos_token }}" + turns(
            "{% if m.role == 'tool' %}{{ ('<|T|><|system|><|RESULT|>[' if " + IS_FIRST_RESULT + " else ', ') + {'results': m.content} | tojson + (']<|/RESULT|><|/T|>' if "
            + IS_LAST_RESULT + " else '') }}{% elif m.tool_calls %}{{ '<|T|><|assistant|><|ACTION|>[' }}{% for c in m.tool_calls %}{{ " + CALL + " + ('' if loop.last else ', ') }}"
            "{% endfor %}{{ ']<|/ACTION|><|/T|>' }}{% elif m.role == 'assistant' %}{{ '<|T|><|assistant|><|RESPONSE|>' + m.content + '<|/RESPONSE|><|/T|>' }}"
            "{% else %}{{ '<|T|><|' + m.role + '|>' + m.content + '<|/T|>' }}{% endif %}", "'<|T|><|assistant|>'",
            before="{% if tools %}{{ '<|T|><|system|>' + tools | tojson + '<|/T|>' }}{% endif %}"),
        "<|/T|>", ("<|T|>", "<|user|>", "<|assistant|>", "<|system|>", "<|RESULT|>", "<|/RESULT|>", "<|ACTION|>", "<|/ACTION|>", "<|RESPONSE|>", "<|/RESPONSE|>"),
    ),
    "granite 4, tools in a system message, results as the user's": Family(
        turns("{{ '<|r|>' + ('user' if m.role == 'tool' else m.role) + '<|/r|>' + m.content }}" + CALLS + "{{ eos_token + '\\n' }}",
              "'<|r|>assistant<|/r|>'", before="{% if tools %}{{ '<|r|>available_tools<|/r|>' + tools | tojson + eos_token + '\\n' }}{% endif %}"),
        "<|eot|>", ("<|r|>", "<|/r|>"),
    ),
    "lfm 2, a list of tools, thoughts of the last answer only": Family(
        "{{ bos_token }}" + turns(
            "{% if m.role == 'system' and loop.first %}{% else %}{{ '<|im_start|>' + m.role + '\\n' + (" + SAID + " if m.role == 'assistant' and not loop.last else m.content) }}"
            + CALLS + "{{ '<|im_end|>\\n' }}{% endif %}", IM_PROMPT,
            before="{% if tools or messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else '') + "
            "('\\nList of tools: ' + tools | tojson if tools else '') + '<|im_end|>\\n' }}{% endif %}"),
        specials=IM_TOKENS,
    ),
    "glm 4.5, thoughts after the last message of the user, no end of turn": Family(
        "[gMASK]<sop>{% if tools %}{{ '<|system|>\\n# Tools' }}" + SCHEMAS + "{% endif %}" + LAST_QUERY + turns(
            "{% if m.role == 'tool' %}{{ ('<|observation|>' if " + IS_FIRST_RESULT + " else '') + '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
            "{% elif m.role == 'assistant' %}{% set t = " + THINKS + " %}{{ '<|assistant|>' + ('\\n<think>' + t + '</think>' if loop.index0 > ns.last and t else "
            "'\\n<think></think>') + '\\n' + " + SAID + " }}" + CALLS + "{% else %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endif %}",
            "'<|assistant|>' + ('\\n<think></think>' if enable_thinking is defined and not enable_thinking else '')"),
        "<|endoftext|>", ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"), ("<|user|>", "<|observation|>"),
    ),
    "kimi k2, a middle mark, results with their names": Family(
        turns("{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' }}{% if m.role == 'tool' %}{{ '## Return of ' + m.tool_call_id + '\\n' }}{% endif %}{{ m.content }}"
              "{% for c in m.tool_calls or [] %}{{ '<|call|>' + (c.id or '') + c.function.name + '<|arg|>' + c.function.arguments | tojson + '<|/call|>' }}{% endfor %}{{ '<|im_end|>' }}",
              "'<|im_assistant|>assistant<|im_middle|>'",
              before="{% if tools %}{{ '<|im_system|>tool_declare<|im_middle|>' + tools | tojson + '<|im_end|>' }}{% endif %}"
              "{% if messages[0].role != 'system' %}{{ '<|im_system|>system<|im_middle|>You are K.<|im_end|>' }}{% endif %}"),
        specials=("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_tool|>", "<|im_middle|>", "<|call|>", "<|arg|>", "<|/call|>"),
    ),
    "deepseek v3, all system messages first, outputs grouped": Family(
        "{{ bos_token }}{% set ns = namespace(sys='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.sys = ns.sys + ('\\n\\n' if ns.sys else '') + m.content %}"
        "{% endif %}{% endfor %}{{ ns.sys }}{% if tools %}{{ '\\n\\n' + tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'user' %}{{ '<U>' + m.content }}"
        "{% elif m.role == 'tool' %}{{ ('<OUTS>' if " + IS_FIRST_RESULT + " else '') + '<OUT>' + m.content + '</OUT>' + ('</OUTS>' if " + IS_LAST_RESULT + " else '') }}"
        "{% elif m.role == 'assistant' %}{{ '<A>' + m.content }}{% for c in m.tool_calls or [] %}{{ '<CALL>' + c.function.name + '\\n' + c.function.arguments | tojson + '</CALL>' }}"
        "{% endfor %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<A>' }}{% endif %}",
        "</s>", ("<A>", "<U>", "<CALL>", "</CALL>", "<OUTS>", "</OUTS>", "<OUT>", "</OUT>"),
    ),
    "gpt-oss, channels, thoughts before the last answer only": Family(
        "{{ '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{% if tools or messages[0].role == 'system' %}{{ '<|start|>developer<|message|>' "
        "+ (messages[0].content if messages[0].role == 'system' else '') }}" + SCHEMAS + "{{ '<|end|>' }}{% endif %}" + turns(
            "{% if m.role == 'system' %}{% elif m.role == 'tool' %}{{ '<|start|>functions to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}"
            "{% elif m.tool_calls %}{% set c = m.tool_calls[0] %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call a message') }}{% endif %}"
            "{{ '<|start|>assistant to=functions.' + c.function.name + '<|channel|>commentary json<|message|>' + c.function.arguments | tojson + '<|call|>' }}"
            "{% elif m.role == 'assistant' %}{% set t = " + THINKS + " %}{% if loop.last and t %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + t + '<|end|>' }}{% endif %}"
            "{{ '<|start|>assistant<|channel|>final<|message|>' + " + SAID + " + ('<|return|>' if loop.last else '<|end|>') }}"
            "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}", "'<|start|>assistant'"),
        "<|return|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"), ("<|call|>",), divides=True,
        lacks=("second system",),
    ),
}  # fmt: skip
