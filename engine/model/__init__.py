"""The model on tensors: the forward pass, its weights and their next version, the draws."""
