"""Training: config, model, loss, engine, loop, checkpoints, metrics."""
