"""A causal language model in two halves: the backbone and the head; loading, saving, adapters."""
