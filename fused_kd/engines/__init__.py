"""Engines: from hidden states (or logits) to per-token losses and gradients, a chunk of tokens or a tile at a time."""
