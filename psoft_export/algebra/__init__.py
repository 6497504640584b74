"""Functions from tensors to tensors: rotations, merged weights, rounding. No files, no models."""
