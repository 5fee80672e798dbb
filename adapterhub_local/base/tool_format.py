"""How models write calls of tools under a chat template: one answer for training and for the server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes a call: JSON between `begin` and `end`, with the arguments under `key`.

    An empty `begin`: the whole answer is one call. `is_prompted`: the template knows no tools, so the system's turn has
    them.
    """

    begin: str
    end: str
    key: str
    is_prompted: bool = False


HERMES = ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments")  # Hermes, Qwen 2.5 and 3, and many others
LLAMA = ToolFormat("", "", "parameters")  # Llama 3.1 and later
PROMPTED = ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments", is_prompted=True)  # any base


def format_of(template: str) -> ToolFormat:
    """How calls are written under a chat template."""
    if "tools" in template and "<tool_call>" in template:
        return HERMES
    return LLAMA if all(part in template for part in ("tools", '"parameters"', "ipython")) else PROMPTED
