"""Self-distillation from a resource-rich language: transfer sets, their quality and arms, and small tasks."""
