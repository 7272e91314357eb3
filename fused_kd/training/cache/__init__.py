"""A teacher's top-k lists on disk, and training from them."""
