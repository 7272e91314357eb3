"""The row as one Triton kernel."""
