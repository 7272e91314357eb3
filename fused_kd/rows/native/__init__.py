"""The row in C, compiled at first use."""
