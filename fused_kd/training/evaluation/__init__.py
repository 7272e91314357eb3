"""Translations and their scores, significance, and what is hard for a model."""
