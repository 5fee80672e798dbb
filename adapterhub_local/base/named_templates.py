"""Chat templates by name, for bases that have none: turns between marks, as the families of these names have them."""

from typing import Any

from adapterhub_local.errors import InputError

_PROMPT = "{% if add_generation_prompt %}"
NAMED_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        "'<|im_end|>\\n' }}{% endfor %}" + _PROMPT + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}" + _PROMPT
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + "
        "message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}" + _PROMPT
        + "{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{% endfor %}" + _PROMPT + "{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
        + _PROMPT + "{{ '### Response:\\n' }}{% endif %}"
    ),
}  # fmt: skip


def named_template(name: str, own: Any) -> str:
    """The template of this name: one of the tokenizer's `own`, if it has several, or of `NAMED_TEMPLATES`.

    Raises InputError with the known names.
    """
    several = own if isinstance(own, dict) else {}
    if name in several:
        return str(several[name])
    if name in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[name]
    known = ", ".join([*several, *NAMED_TEMPLATES])
    raise InputError(f"there is no chat template '{name}': known are {known}, or name a .jinja file")
