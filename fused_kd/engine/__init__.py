"""Engines: from hidden states (or logits) to per-token losses and gradients, one chunk of tokens at a time."""
