"""CycleDistill: a model improves its own translation from monolingual text and a handful of pairs."""
