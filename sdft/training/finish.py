"""After the last step: the finished model."""

import shutil
from pathlib import Path

from sdft import files
from sdft.errors import SdftError
from sdft.model import card, saving
from sdft.training.run import Run


def finish(run: Run, output: Path) -> Path:
    """Writes the model (or adapter), its tokenizer and its card to OUTPUT/model, aside first. Returns that folder.

    Raises SdftError if it cannot be written.
    """
    final, partial = output / "model", output / "partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    text = card.model_card(run.config, run.data.digest, len(run.data.examples), run.steps, run.result)
    try:
        saving.save(run.model, run.tokenizer, partial, final)
        (partial / "README.md").write_text(text)
        if final.exists():  # from an earlier end of this run, with the same weights
            files.remove(final, output)
        files.publish(partial, final)
    except Exception as error:  # safetensors raises its own kind of error for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise SdftError(
            f"{final}: not written: {files.why(error)}; the newest checkpoint is whole: --resume writes it"
        ) from error
    return final
