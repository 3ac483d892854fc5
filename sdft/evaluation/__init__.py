"""What a model can do: accuracy, drift from its base, lm-evaluation-harness."""
