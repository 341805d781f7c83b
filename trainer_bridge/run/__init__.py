"""A run of C3PO++: engines, a run file, an output, and a driver between them. Torch-free."""
