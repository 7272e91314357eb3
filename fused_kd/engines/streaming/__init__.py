"""The engine that holds no logits."""
