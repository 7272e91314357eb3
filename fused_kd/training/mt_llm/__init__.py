"""MT-LLM (arXiv 2406.12739): a machine-translation encoder stacked under an LLM by self-distillation."""
