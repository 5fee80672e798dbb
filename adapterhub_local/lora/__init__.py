"""Adapters and deltas: PEFT's format in and out, and the strict reader of untrusted files.

Import from the modules: `config`, `header`, `names`, `scale` and `contents` are light (`pattern` loads RE2 where it
matches), `finite` loads numpy, `adapter` and `write` load torch.
"""
