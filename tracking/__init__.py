"""What a run reports: metrics.jsonl, the console, wandb, profiles."""
