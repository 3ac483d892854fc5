"""One run: its step, its loop, its checkpoints and its metrics."""
