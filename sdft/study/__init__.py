"""Many runs: tasks in sequence, methods, learning rates and seeds, and their report."""
