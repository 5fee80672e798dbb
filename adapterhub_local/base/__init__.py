"""Shared 4-bit bases: quantise once, fingerprint, load. `store` is light; `add` and `load` bring torch."""
