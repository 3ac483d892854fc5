"""TRL's self-distillation and distillation trainers on the fused loss: TRL's names, TRL's arguments, no logits.

    from sdft.integrations.trl import SDFTTrainer  # or SDPOTrainer, GKDTrainer, DistillationTrainer

Each class is a subclass of TRL's class that computes the loss from hidden states and heads. Rollouts, data, teacher,
logging and checkpoints stay TRL's. Nothing of TRL is patched. A class refuses what it cannot do at construction, with
the name of the argument; docs/integrations.md has the table.
"""

from importlib.metadata import version

from sdft.integrations.trl.versions import TESTED, check_version

try:
    from sdft.integrations.trl.distillation import DistillationTrainer, GKDTrainer
    from sdft.integrations.trl.self_distillation import SDFTTrainer, SDPOTrainer
except ImportError as error:
    raise ImportError(
        f"sdft.integrations.trl needs TRL {TESTED[0]} or later: pip install '.[trl]' in a checkout ({error})",
        name=error.name,
    ) from error

__all__ = ["DistillationTrainer", "GKDTrainer", "SDFTTrainer", "SDPOTrainer"]

check_version(version("trl"))
