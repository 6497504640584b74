"""The basis (A, B) of a module: the principal subspace of its frozen weight."""
