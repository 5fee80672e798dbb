"""Adapters and deltas: PEFT's format in and out, and the strict reader of untrusted files.

Import from the modules: `config`, `header` and `layout` are light, `finite` loads numpy, `adapter` and
`write` load torch.
"""
