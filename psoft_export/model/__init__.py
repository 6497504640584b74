"""The model behind a checkpoint: its class, modules and tensor names, without its weights."""
