"""Gradients to new weights."""
