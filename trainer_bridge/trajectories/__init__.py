"""Complete groups on their way from an engine to the ranks of a trainer. Torch-free."""
