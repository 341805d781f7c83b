"""/weights: which version serves, and its changes."""
