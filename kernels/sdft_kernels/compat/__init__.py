"""Other libraries' losses, with their names and signatures, on this package's loops.

Nothing here imports the library it stands in for. `liger` is Liger-Kernel's divergences.
"""
