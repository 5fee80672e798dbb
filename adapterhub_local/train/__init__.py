"""Training: data, masking, packing, the trainer, and a run from recipe to registered version."""
