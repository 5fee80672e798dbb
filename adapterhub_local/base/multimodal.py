"""The text part of a model that also sees or hears: its config, and which tensors of the checkpoint are its own.

What is left out (vision and audio towers, projectors) takes part in no computation on text alone, so the logits of the
text part are those of the whole model.
"""

import re
from collections.abc import Iterable
from typing import Any

from adapterhub_local.errors import BadFile

OTHERS = ("vision_config", "audio_config", "speech_config", "vision_tower_config", "encoder_config")
# where the whole model keeps its text part: as saved since transformers 4.52, and before
_TEXT = (
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(lm_head\.)"), r"\1"),
)


def is_multimodal(config: Any) -> bool:
    """Whether a config is of a model that takes more than text, with a text part of its own."""
    return getattr(config, "text_config", None) is not None and any(getattr(config, key, None) for key in OTHERS)


def text_part(config: Any, names: Iterable[str]) -> tuple[Any, dict[str, str]]:
    """The config of the text part, and its tensors: the name in the text model -> in the checkpoint.

    Raises BadFile where no tensor of the checkpoint belongs to it.
    """
    text = config.get_text_config()
    own: dict[str, str] = {}
    for name in names:
        for pattern, ours in _TEXT:
            if pattern.match(name):
                own[pattern.sub(ours, name)] = name
                break
    if not own:
        raise BadFile(f"{type(config).__name__} has no text part under model.language_model or language_model.model")
    text.tie_word_embeddings = "lm_head.weight" not in own
    if text.dtype is None:
        text.dtype = config.dtype
    return text, own
