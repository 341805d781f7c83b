"""C3PO++: the controller as a pure state machine, its books, a simulator. Torch-free."""
