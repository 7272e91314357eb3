"""Rows: a chunk of logits in, losses and logit gradients out; a folder a backend."""
