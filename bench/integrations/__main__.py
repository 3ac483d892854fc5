"""The numbers of docs/integrations.md, on the CPU: `python -m bench.integrations NAME`.

liger       the classes of sdft_kernels.compat.liger and of liger-kernel: errors and memory
trl         TRL's trainers with TRL's loss and with sdft.integrations.trl: memory and losses
examples    a step of examples/train_plain.py with and without logits: memory
"""

import importlib
import sys

NAMES = ("liger", "trl", "examples")


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in NAMES:
        raise SystemExit(__doc__)
    importlib.import_module(f".{arguments[0]}", __package__).main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
