"""The core's process without its tensors: the step loop, who runs in a step, where the KV is. Torch-free."""
