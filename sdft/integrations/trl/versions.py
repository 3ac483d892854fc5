"""The versions of TRL that the trainers were tested with."""

import warnings

TESTED = ("1.15", "1.16")  # minor versions; docs/integrations.md has the test


def check_version(found: str) -> None:
    """Raises ImportError for a TRL older than the tested versions; warns of a newer one, whose internals may differ."""
    minor = tuple(int(part) for part in found.split(".")[:2])
    oldest, newest = (tuple(int(part) for part in tested.split(".")) for tested in (TESTED[0], TESTED[-1]))
    if minor < oldest:
        raise ImportError(f"sdft.integrations.trl needs TRL {TESTED[0]} or later, not {found}: pip install -U trl")
    if minor > newest:
        warnings.warn(
            f"sdft.integrations.trl was tested with TRL {' and '.join(TESTED)}, not with {found}: "
            f"compare the first losses with those of TRL's trainer, or pip install 'trl=={TESTED[-1]}.*'",
            stacklevel=3,
        )
