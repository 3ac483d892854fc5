"""`python -m sdft` and the command `sdft`."""

import sys


def main() -> None:
    """Runs the command line; says what to install where only the loss is there."""
    try:
        from sdft.cli import main as run
    except ModuleNotFoundError as error:
        print(
            f"sdft: the trainer needs more than the loss ({error.name} is missing); "
            "run: pip install '.[train]' in a checkout (the sdft of PyPI is another project)",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
