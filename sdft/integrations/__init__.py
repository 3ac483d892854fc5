"""The fused loss inside other projects' trainers; a module per project, imported by name."""
