"""Reports of a run: metrics.jsonl, console, TensorBoard, wandb, profiles."""
