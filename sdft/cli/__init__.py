"""The command `sdft`: `arguments` declares the options, `commands` runs them through sdft.api, `show` prints.

What a command needs of torch is imported only when its options have been checked: a mistake costs no second.
"""

import difflib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from sdft import __version__
from sdft.cli.arguments import DATA_ARGS
from sdft.cli.commands import COMMANDS
from sdft.errors import SdftError

__all__ = ["DATA_ARGS", "main", "quiet_libraries"]

OVERVIEW = """sdft: Self-Distillation Fine-Tuning (arXiv 2601.19897)

  sdft train CONFIG.toml [--optim.lr 2e-5 ...]   train; an option overrides a setting of the file
                         [--resume]              resume an interrupted run
                         [--guard DATA.jsonl --max-drop 2]   stop if more than 2 points are lost on these records
  sdft plan CONFIG.toml [--memory 12GB]          does the run fit, and what to change if not; loads no weights
  sdft check CONFIG.toml [--count 32]            can the teacher use the demonstrations? run this first
  sdft study STUDY.toml [--list] [--plan]        tasks in sequence x methods x learning rates x seeds
                        [--report]               write the report of what is finished; run nothing
  sdft eval MODEL DATA.jsonl                     accuracy by greedy generation
  sdft eval MODEL --harness hellaswag,mmlu       prior skills by lm-evaluation-harness
  sdft generate MODEL PROMPT                     print a completion
  sdft data TASK [SOURCE] FOLDER                 write training records and evaluation files of a task
  sdft merge ADAPTER FOLDER                      merge a LoRA adapter into its base, as a plain model
  sdft convert gguf FILE.gguf FOLDER             convert a GGUF model to a Hugging Face folder

`sdft COMMAND --help` explains every option."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. A mistake of the user is one line on stderr and exit status 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(OVERVIEW)
        return
    if args[0] in ("-V", "--version"):
        print(f"sdft {__version__}")
        return
    try:
        run = COMMANDS.get(args[0])
        if run is None:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(COMMANDS)}"
            raise SdftError(f"unknown command {args[0]!r}; {hint}")
        quiet_libraries()
        run(args[1:])
    except SdftError as error:
        print(f"sdft: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # what reads our output has ended, as in `sdft train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        raise SystemExit(141) from None


def quiet_libraries() -> None:
    """Turns off telemetry, and the notes of transformers about matters that the user cannot act on."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft imports bitsandbytes, which notes that a faster 4-bit kernel is missing, also if no weight has 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # names that it will rename
