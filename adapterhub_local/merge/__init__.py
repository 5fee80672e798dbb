"""Merging adapters on their deltas, exactly, with the loss known before anything is written.

`algebra` has the functions on tensors, `plan` what is merged and whether it may be, `run` does it.
"""
