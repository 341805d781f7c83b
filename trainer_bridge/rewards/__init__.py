"""What a rollout is worth, and the processes that say so. Torch-free."""
