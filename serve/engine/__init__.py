"""The engine: schedule, acquire, forward, sample, update. It knows token ids and digests, never text, names or HTTP."""
