"""Text to token ids and back: templates, tools, grammars, and answers piece by piece."""
