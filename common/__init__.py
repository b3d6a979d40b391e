"""What all three methods stand on: towers, data, counting, evaluation and the `lightning` command."""
