"""What a user runs: one module per MLproject entry point, tracked by MLflow."""
