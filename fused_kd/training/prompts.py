"""Prompts and the tokenised rows made of them."""
