"""The row in plain PyTorch."""
