"""adapterhub-local: many LoRA adapters over one shared 4-bit base model.

from adapterhub_local import Registry
Registry().resolve("sentiment@prod").path     # a folder that plain PEFT loads
"""

from adapterhub_local.errors import QhubError
from adapterhub_local.refs import Mix, Reference
from adapterhub_local.registry import Registry, Version

__all__ = ["Mix", "QhubError", "Reference", "Registry", "Version"]
