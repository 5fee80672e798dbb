"""Adapters in the formats that other tools read: GGUF, fused 16-bit models, Ollama."""
