"""The numbers of docs/integrations.md: `python -m bench.integrations`."""
