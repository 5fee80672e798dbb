"""Routers: which adapter a text is for, learnt from the adapters' own prompts on the base's own embeddings."""
