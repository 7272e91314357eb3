"""Benchmarks, run from the root: ``python -m bench run`` on a CPU, ``python -m bench gpu`` on an NVIDIA GPU."""
