"""Parallel text, instructions and prompts: from files, the hub or the built-in corpus to token ids."""
