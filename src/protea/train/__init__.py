"""Pre-training: recipes, the loop, checkpoints that resume exactly, metrics."""
