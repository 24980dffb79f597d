"""Use what was trained: a conversation that learns, in the terminal and behind an OpenAI-compatible endpoint, and export to other tools."""
