"""The front's side of rollouts: accepted, grown, read, kept, moved. Torch-free."""
