"""`everstep rollout`: from prompts to trajectories, on an engine here or on servers. Torch-free."""
