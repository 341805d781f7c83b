"""Checkpoint folders: what is in them, how they are read, written, made and described."""
