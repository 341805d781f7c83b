"""Durable rollouts in one SQLite file (docs/explain/journal.md). Torch-free."""
