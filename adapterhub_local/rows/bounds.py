"""What is held in memory at once while a row is computed, in tokens and bytes. The estimator reads it; no torch."""

LOGITS_BYTES = 128 << 20  # of float32 logits: more are computed in chunks (train/loss.py)
MLP_TOKENS = 2048  # of a row that an MLP takes at once when blocks are offloaded (train/checkpointing.py)
HEAP_CHUNK = 8 << 20  # bytes from which glibc maps a tensor in pages of its own on the CPU (train/heap.py)
