"""What a trained encoder is used for: each file has the metrics of a task, its model if it has one, and its card."""
