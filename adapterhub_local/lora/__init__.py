"""Adapters and deltas: PEFT's format in and out, and the strict reader of untrusted files.

Import from the modules: `config` and `header` are light, `adapter` and `write` load torch.
"""
