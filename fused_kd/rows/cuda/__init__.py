"""The row in CUDA C++, compiled at first use."""
