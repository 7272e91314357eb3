"""What the training scripts share: data, prompts, the Trainer, generation and scores (extra ``train``)."""
