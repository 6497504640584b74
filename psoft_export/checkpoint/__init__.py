"""Folders and files: finding checkpoints, reading them lazily, writing them whole or not at all."""
