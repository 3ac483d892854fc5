"""`python -m sdft` and the command `sdft`."""

import sys
from importlib import metadata


def main() -> None:
    """Runs the command line; explains what to install if only the loss is installed."""
    warn_of_namesake()
    try:
        from sdft.cli import main as run
    except ModuleNotFoundError as error:
        print(
            f"sdft: the trainer needs more than the loss ({error.name} is missing); "
            "run: pip install '.[train]' in a checkout",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    run()


def warn_of_namesake() -> None:
    """Warns if the distribution `sdft` of PyPI is installed: another project, whose package has our name."""
    try:
        other = metadata.distribution("sdft")
    except metadata.PackageNotFoundError:
        return
    if "sdft_kernels" not in (other.read_text("top_level.txt") or "").split():  # an earlier version of ours has it
        print(
            f"sdft: the distribution sdft {other.version} is another project, and its files replace ours; "
            "run: pip uninstall sdft, and install sdft-trainer again",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
