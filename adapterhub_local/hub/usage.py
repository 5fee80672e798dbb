"""How a pushed version is used: with PEFT, with qhub and with vLLM, as the model card shows it."""

import re
from collections.abc import Mapping
from typing import Any

from adapterhub_local.base.mixtures import ARCHITECTURES
from adapterhub_local.base.quantisation import kind_called
from adapterhub_local.registry import Version

MIXTURE = " (but for its experts, which transformers keeps in 16 bits)"


def usage(version: Version, base: Mapping[str, Any], base_id: str, repo_id: str, max_lora_rank: int | None) -> str:
    """A section in Markdown; `base` is the lineage's entry of it, `max_lora_rank` as in `card`."""
    tag = f"v{version.number}"
    is_pinned = base.get("hub_id") == base_id and re.fullmatch(r"[0-9a-f]{40}", str(base.get("revision")))
    kind = kind_called(base.get("quantisation"))
    note = MIXTURE if base.get("architecture") in ARCHITECTURES else ""
    given = f" --chat-template {base['chat_template']}" if base.get("chat_template") else ""
    written = f"\n# the adapter's chats were written with the chat template {base['chat_template']}" if given else ""
    source = f'"{base_id}", revision="{base["revision"]}"' if is_pinned else f'"{base_id}"'
    return f"""## Use it

With PEFT, over the base in the 4-bit form it was made for{note}:

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

{kind.codes} = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{kind.codes}",
    bnb_4bit_use_double_quant={kind.nested is not None},
    bnb_4bit_compute_dtype=torch.bfloat16,
)
base = AutoModelForCausalLM.from_pretrained({source}, quantization_config={kind.codes})
model = PeftModel.from_pretrained(base, "{repo_id}", revision="{tag}")
tokenizer = AutoTokenizer.from_pretrained({source}){written}

chat = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs.to(model.device), max_new_tokens=64, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

With adapterhub-local, which checks every byte against `qhub-manifest.json`:

```sh
qhub base add {_short(base_id)} {base_id}{given}
qhub pull {repo_id}@{tag} --name {version.name}
qhub serve --base {_short(base_id)}
```

{_vllm(version, base_id, repo_id, max_lora_rank)}"""


def _vllm(version: Version, base_id: str, repo_id: str, max_lora_rank: int | None) -> str:
    if max_lora_rank is None:
        why = "it has DoRA or rows of embeddings, or its rank or scale differs by module, or its rank is above 512"
        return f"vLLM does not read this adapter as it is: {why}."
    short = version.name.replace("/", "-")
    return f"""With vLLM, whose base is in 16 bits unless asked otherwise:

```sh
pip install vllm bitsandbytes
hf download {repo_id} --revision v{version.number} --local-dir {short}
vllm serve {base_id} --quantization bitsandbytes --enable-lora --max-lora-rank {max_lora_rank} \\
  --lora-modules {short}=./{short}
```"""


def _short(base_id: str) -> str:
    """A name a base may have here."""
    return re.sub(r"[^a-z0-9]+", "-", base_id.rpartition("/")[2].lower()).strip("-") or "base"
