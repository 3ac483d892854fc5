"""Completions to hidden states of the student and of the teacher."""
