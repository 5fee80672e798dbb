"""What is held in memory at once while a row is computed, in tokens and bytes. The estimator reads it; no torch."""

LOGITS_BYTES = 128 << 20  # of float32 logits: more are computed in chunks (train/loss.py)
MLP_TOKENS = 2048  # of a row that an MLP takes at once when blocks are offloaded (train/checkpointing.py)
HEAP_CHUNK = 8 << 20  # bytes from which glibc maps a tensor in pages of its own on the CPU (train/heap.py)
DRAWN_AT_ONCE = 64  # answers that GRPO's engine writes at once (train/objectives/drawing.py)
KV_PAGE = 16  # tokens of a page of its keys and values


def drawn_tokens(samples: int, max_tokens: int, longest: int, most: int) -> int:
    """Tokens whose keys and values are held while `samples` answers a prompt of up to `max_tokens` are drawn.

    longest: of the prompts, which their answers share; each answer begins in a page of its own. most: of prompt and
    answer together, all of which must fit.
    """
    prompts = -(-DRAWN_AT_ONCE // samples)
    return max(DRAWN_AT_ONCE * (max_tokens + 2 * KV_PAGE) + prompts * (longest + KV_PAGE), most)
