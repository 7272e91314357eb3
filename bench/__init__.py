"""Benchmarks: ``python -m bench run`` on a CPU, ``python -m bench gpu`` on an NVIDIA GPU, from the root."""
