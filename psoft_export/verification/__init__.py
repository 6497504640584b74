"""Proof that a merged checkpoint is what base and adapter mean: by weights, geometry, outputs."""
