"""What is told of a run: metrics, the console, wandb, profiles."""
