"""The options of each command: type, range, default and text in one place."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass

from sdft.config import LIST, STRICT, Config, Settings

Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
ModelName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
FolderPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
SourcePath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
RunConfig = Annotated[Config, tyro.conf.arg(name="")]  # its options bear no prefix: --optim.lr


@dataclass(frozen=True, config=STRICT)
class Arguments(Settings):
    """The options of a command. An error names an option as it is written, such as --max-new-tokens."""

    @classmethod
    def named(cls, name: str) -> str:
        return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, config=STRICT)
class PlanArgs(Arguments):
    """`sdft plan CONFIG.toml`: predicts the peak memory of each phase of a step; loads no weights.

    Exit status: 0 if the run fits, 1 if it does not."""

    memory: str = ""
    """Size of the device, such as 12GB; by default, the size of the device of this machine. For the GPU of another
    machine also give --model.device cuda."""
    prompt_tokens: Count = 0
    """Tokens of every student prompt; 0 reads the prompts of data.train."""
    teacher_prompt_tokens: Count = 0
    """With --prompt-tokens: tokens of every teacher prompt; 0 adds the longest completion to the student prompt."""
    json: bool = False
    """Print the numbers as JSON, in bytes, and nothing else."""
    config: RunConfig = field(default_factory=Config)
    """The settings of the run."""


@dataclass(frozen=True, config=STRICT)
class CheckArgs(Arguments):
    """`sdft check CONFIG.toml`: greedy accuracy on training records, without and with the demonstration.

    Exit status: 0 if SDFT can work, 1 if it cannot."""

    count: Positive = 32
    """Records to check, taken evenly from the training data."""
    show: Count = 3
    """Requests whose two answers are printed side by side."""
    config: RunConfig = field(default_factory=Config)
    """The settings of the run; the check reads model, data and teacher, and eval.max_new_tokens."""


@dataclass(frozen=True, config=STRICT)
class StudyArgs(Arguments):
    """`sdft study STUDY.toml`: compares methods on tasks that are learned one after the other (docs/study.md).

    A finished stage is never run again. The same command continues an interrupted study. The study ends with
    OUTPUT/report.html and report.md."""

    study: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDY.toml")]
    """The TOML file of the study."""
    only: Annotated[tuple[str, ...], LIST] = ()
    """Run only these methods."""
    list: bool = False
    """Print the name of each cell and what is finished; run nothing. The data may be missing."""
    report: bool = False
    """Write the report of what is finished; run nothing."""
    model: str = ""
    """A model instead of config.model.name of the file; give --output as well."""
    output: str = ""
    """A folder instead of the output of the file."""
    plan: bool = False
    """Print peak memory and time of every distinct run; load no weights and run nothing."""
    memory: str = ""
    """With --plan: size of a GPU, such as 80GB; by default, the device of this machine."""
    tflops: Annotated[float, Field(gt=0, le=10**6)] = 100.0
    """With --plan: 1e12 operations per second that the device does on average, sampling included. This is your
    assumption."""
    prompt_tokens: Count = 0
    """With --plan: tokens of every student prompt; 0 reads the data."""
    teacher_prompt_tokens: Count = 0
    """With --prompt-tokens: tokens of every teacher prompt; 0 adds the longest completion to the student prompt."""
    records: Count = 0
    """With --prompt-tokens: number of records of every training file."""


@dataclass(frozen=True, config=STRICT)
class EvalArgs(Arguments):
    """`sdft eval MODEL DATA.jsonl`: accuracy by greedy generation; each record names its check.

    `sdft eval MODEL --harness hellaswag,winogrande`: tasks of lm-evaluation-harness. Both can be given."""

    model: ModelName
    """A model: folder, adapter folder, hub name, .gguf file or smollm2-135m. Or CONFIG.toml: the model that the config
    names, with the settings of the config."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[DATA]")] = ""
    """Records with prompt and answer."""
    max_new_tokens: Positive = 64
    """Longest answer, in tokens."""
    batch_size: Positive = 64
    """Prompts that are completed together."""
    system: str = ""
    """System message of records that have none."""
    show: Count = 0
    """Number of answers to print."""
    output: str = ""
    """Write every answer to this .jsonl file."""
    samples: Count = 0
    """Sample this many answers to each record in addition: pass@k, the chance that one of k is right."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Temperature of the samples; 1 samples from the distribution of the model."""
    top_p: TopP = 1.0
    """Nucleus sampling of the samples: keep the most likely tokens of this total probability."""
    seed: Seed = 0
    """Seed of the samples."""
    harness: str = ""
    """Tasks or groups of lm-evaluation-harness, or task .yaml files, separated by commas."""
    limit: Positive | None = None
    """Harness: number of items of each task, from the first one; by default, all."""
    include_path: str = ""
    """Harness: a folder with task .yaml files that you wrote."""
    fewshot: Count | None = None
    """Harness: number of examples in the prompt; by default, the number that the task names."""
    chat: bool = False
    """Harness: lay out every prompt by the chat template."""
    allow_code: bool = False
    """Harness: run code that the model wrote (humaneval). Better in a container."""
    json: bool = False
    """Harness: also print the scores as a line of JSON."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the matrix products. auto: bfloat16 if the device multiplies it fast, else float32."""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), or a torch device."""

    def tasks(self) -> "list[str]":
        """The tasks of --harness."""
        return [name.strip() for name in self.harness.split(",") if name.strip()]


@dataclass(frozen=True, config=STRICT)
class GenerateArgs(Arguments):
    """`sdft generate MODEL PROMPT`: one completion of a prompt, or several."""

    model: ModelName
    """A model: folder, adapter folder, hub name, .gguf file or smollm2-135m."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """The turn of the user."""
    system: str = ""
    """System message."""
    max_new_tokens: Positive = 128
    """Longest completion, in tokens."""
    temperature: Temperature = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: TopP = 1.0
    """Nucleus sampling: keep the most likely tokens of this total probability."""
    count: Positive = 1
    """Number of completions."""
    seed: Seed = 0
    """Seed of the sampling."""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), or a torch device."""


@dataclass(frozen=True, config=STRICT)
class SkillArgs(Arguments):
    """`sdft data commands|facts|style FOLDER`: a made-up skill that a 135M model can learn on a CPU."""

    folder: FolderPath
    """Folder to write train.jsonl and the evaluation files to."""
    seed: Seed = 0
    """Another seed makes another skill of the same kind, or holds out other parts of it."""


@dataclass(frozen=True, config=STRICT)
class DemoArgs(Arguments):
    """`sdft data demo FOLDER`: the data of `make demo`, made-up capitals and commands."""

    folder: FolderPath
    """Folder to write the files to."""
    style: Literal["terse", "sentence"] = "terse"
    """Form of the capitals' demonstrations: a bare name, or a sentence as the model would write it."""


@dataclass(frozen=True, config=STRICT)
class ToolAlpacaArgs(Arguments):
    """`sdft data toolalpaca SOURCE FOLDER`: tool calls from a ToolAlpaca file of yours."""

    source: SourcePath
    """eval_simulated.json, train_data.json or a file like them."""
    folder: FolderPath
    """Folder to write train.jsonl and the evaluation files to."""
    held_out: Fraction = 0.3
    """Share of the APIs that is kept for evaluation; 0 keeps none, 1 keeps all."""
    seed: Seed = 0
    """Seed that draws the APIs that are kept for evaluation."""


@dataclass(frozen=True, config=STRICT)
class SciKnowEvalArgs(Arguments):
    """`sdft data sciknoweval SOURCE FOLDER`: multiple choice from a SciKnowEval file of yours."""

    source: SourcePath
    """JSON or JSONL with question, choices and answerKey."""
    folder: FolderPath
    """Folder to write train.jsonl and eval.jsonl to."""
    domain: str = ""
    """Take only questions of this domain, such as Chemistry."""
    level: str = ""
    """Take only questions of this level, such as L3."""
    held_out: Fraction = 0.1
    """Share of the questions that is kept for evaluation; 0 keeps none, 1 keeps all."""
    seed: Seed = 0
    """Seed that draws the questions that are kept for evaluation."""


@dataclass(frozen=True, config=STRICT)
class KnowledgeArgs(Arguments):
    """`sdft data knowledge SOURCE FOLDER`: articles of yours with questions about them."""

    source: SourcePath
    """JSONL, one article in each line; docs/tasks.md has the format."""
    folder: FolderPath
    """Folder to write train.jsonl and the evaluation files to."""


DATA_ARGS: dict[str, type[Arguments]] = {
    "demo": DemoArgs,
    "commands": SkillArgs,
    "facts": SkillArgs,
    "style": SkillArgs,
    "toolalpaca": ToolAlpacaArgs,
    "sciknoweval": SciKnowEvalArgs,
    "knowledge": KnowledgeArgs,
}


@dataclass(frozen=True, config=STRICT)
class MergeArgs(Arguments):
    """`sdft merge ADAPTER FOLDER`: merges a LoRA adapter into its base and writes a plain Hugging Face model."""

    adapter: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADAPTER")]
    """An adapter: the model folder of a LoRA run, or any peft LoRA adapter."""
    folder: FolderPath
    """New folder to write."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the written weights; they are merged in float32."""


@dataclass(frozen=True, config=STRICT)
class ConvertArgs(Arguments):
    """`sdft convert gguf FILE.gguf FOLDER`: a GGUF model as a Hugging Face folder."""

    kind: tyro.conf.Positional[Literal["gguf"]]
    """The format of the file."""
    source: SourcePath
    """File to read."""
    target: FolderPath
    """New folder to write."""
