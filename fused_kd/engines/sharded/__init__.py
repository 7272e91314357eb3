"""The engine of a vocabulary that is divided over ranks."""
