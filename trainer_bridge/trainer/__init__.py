"""A rank of the trainer: model, optimiser, batches, checkpoints."""
