"""Versions of the weights on their way from the ranks of a trainer to engines."""
