"""Everything that only a GPU can show, in one command: `make gpu-proof`. See bench/proof/__main__.py."""
