"""The command `sdft`: train, plan, check, study, eval, generate, data, merge, convert."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from sdft import __version__
from sdft.config import Config, ModelConfig, load_config, located, override, validate
from sdft.errors import SdftError

Kind = TypeVar("Kind")

OVERVIEW = """sdft: Self-Distillation Fine-Tuning (arXiv 2601.19897)

  sdft train CONFIG.toml [--optim.lr 2e-5 ...]   train; every setting of the file can be overridden
                         [--resume]              go on with an interrupted run
                         [--guard DATA.jsonl --max-drop 2]   stop where more than 2 points are lost on these records
  sdft plan CONFIG.toml [--memory 12GB]          what will it take, will it fit, what to change; loads no weights
  sdft check CONFIG.toml [--count 32]            can the teacher use the demonstrations? run this first
  sdft study STUDY.toml [--list] [--plan]        tasks in sequence x methods x learning rates x seeds
                        [--report]               the report of what is finished, nothing run
  sdft eval MODEL DATA.jsonl                     accuracy by greedy generation
  sdft eval MODEL --harness hellaswag,mmlu       prior skills by lm-evaluation-harness
  sdft generate MODEL PROMPT                     an answer
  sdft data TASK [SOURCE] FOLDER                 a task in the box: training records and evaluation files
  sdft merge ADAPTER FOLDER                      a LoRA adapter and its base to one plain model
  sdft convert gguf FILE.gguf FOLDER             a GGUF model to a Hugging Face folder

`sdft COMMAND --help` explains every option."""


@dataclass(frozen=True)
class CheckArgs:
    """`sdft check CONFIG.toml`: greedy accuracy on training records without and with the demonstration.

    Exit status 0 where SDFT can work, 1 where it cannot."""

    count: int = 32
    """Records to check, taken evenly from the training data."""
    show: int = 3
    """Requests whose answers are printed side by side."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """The run's settings; model, data, teacher and eval.max_new_tokens matter here."""


@dataclass(frozen=True)
class PlanArgs:
    """`sdft plan CONFIG.toml`: peak memory of each phase of a step, before any weight is loaded.

    Exit status 0 where the config fits, 1 where it does not."""

    memory: str = ""
    """Size of the device, such as 12GB; that of the one here by default. For a GPU elsewhere also give
    --model.device cuda."""
    prompt_tokens: int = 0
    """Tokens of every student prompt; 0 takes the prompts of data.train."""
    teacher_prompt_tokens: int = 0
    """With --prompt-tokens: tokens of every teacher prompt; 0 takes the student's and an answer's more."""
    json: bool = False
    """Print the numbers as JSON, in bytes, and nothing else."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """The run's settings."""


@dataclass(frozen=True)
class StudyArgs:
    """`sdft study STUDY.toml`: methods compared on tasks learned one after the other (docs/study.md).

    Finished stages are never run again; an interrupted study goes on with the same command. It ends with
    OUTPUT/report.html and report.md."""

    study: tyro.conf.Positional[str]
    """The study's TOML file."""
    only: tuple[str, ...] = ()
    """Run only these methods."""
    list: bool = False
    """Name the cells and what is finished, run nothing; the data need not be there."""
    report: bool = False
    """Write the report of what is finished, run nothing."""
    model: str = ""
    """Instead of the file's config.model.name; give --output as well."""
    output: str = ""
    """Instead of the file's output."""
    plan: bool = False
    """Peak memory and time of every distinct run, before any weight is loaded; runs nothing."""
    memory: str = ""
    """With --plan: size of a GPU, such as 80GB; by default the device is the one here."""
    tflops: float = 100.0
    """With --plan: 1e12 operations a second that the device does on average, sampling included: your assumption."""
    prompt_tokens: int = 0
    """With --plan: tokens of every student prompt; 0 reads the data."""
    teacher_prompt_tokens: int = 0
    """With --prompt-tokens: tokens of every teacher prompt; 0 takes the student's and an answer's more."""
    records: int = 0
    """With --prompt-tokens: records of every training file."""


@dataclass(frozen=True)
class EvalArgs:
    """`sdft eval MODEL DATA.jsonl`: accuracy by greedy generation, each record by its own check.

    `sdft eval MODEL --harness hellaswag,winogrande`: tasks of lm-evaluation-harness; both where both are given."""

    model: tyro.conf.Positional[str]
    """A model: folder, adapter folder, hub name, .gguf file or smollm2-135m. Or CONFIG.toml: the model that it names,
    loaded as it says."""
    data: tyro.conf.Positional[str] = ""
    """Records with prompt and answer."""
    max_new_tokens: int = 64
    """Longest answer."""
    batch_size: int = 64
    """Prompts that generate together."""
    system: str = ""
    """System message for records that bring none."""
    show: int = 0
    """Answers to print."""
    output: str = ""
    """Write every answer to this .jsonl file."""
    samples: int = 0
    """Also draw so many answers to each record: pass@k, the chance that one of k is right."""
    temperature: float = 1.0
    """Of the samples; 1 is the model's own distribution."""
    top_p: float = 1.0
    """Nucleus sampling, of the samples."""
    seed: int = 0
    """Of the samples."""
    harness: str = ""
    """Tasks or groups of lm-evaluation-harness, or task .yaml files, with commas between them."""
    limit: int | None = None
    """Harness: items of each task, the first ones; all by default."""
    include_path: str = ""
    """Harness: a folder with task .yaml files of your own."""
    fewshot: int | None = None
    """Harness: examples in the prompt; each task's own number by default."""
    chat: bool = False
    """Harness: put every prompt through the chat template."""
    allow_code: bool = False
    """Harness: run code that the model wrote (humaneval); better in a container."""
    json: bool = False
    """Harness: also print the scores as a line of JSON."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the matrix products."""
    device: str = "auto"
    """auto (cuda, then cpu), or a torch device."""


@dataclass(frozen=True)
class GenerateArgs:
    """`sdft generate MODEL PROMPT`: one answer, or several."""

    model: tyro.conf.Positional[str]
    """A model: folder, adapter folder, hub name, .gguf file or smollm2-135m."""
    prompt: tyro.conf.Positional[str]
    """The user's turn."""
    system: str = ""
    """System message."""
    max_new_tokens: int = 128
    """Longest answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling."""
    count: int = 1
    """Answers to sample."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """auto (cuda, then cpu), or a torch device."""


@dataclass(frozen=True)
class SkillArgs:
    """`sdft data commands|facts|style FOLDER`: a made-up skill that a 135M model can be taught on a CPU."""

    folder: tyro.conf.Positional[Path]
    """Folder to write train.jsonl and the evaluation files to."""
    seed: int = 0
    """Another seed makes another skill of the same kind, or holds out other parts of it."""


@dataclass(frozen=True)
class DemoArgs:
    """`sdft data demo FOLDER`: the data of `make demo`, made-up capitals and commands."""

    folder: tyro.conf.Positional[Path]
    """Folder to write the files to."""
    style: Literal["terse", "sentence"] = "terse"
    """Form of the capitals' demonstrations: a bare name, or a sentence as the model would write it."""


@dataclass(frozen=True)
class ToolAlpacaArgs:
    """`sdft data toolalpaca SOURCE FOLDER`: tool calls from a ToolAlpaca file of yours."""

    source: tyro.conf.Positional[Path]
    """eval_simulated.json, train_data.json or a file like them."""
    folder: tyro.conf.Positional[Path]
    """Folder to write train.jsonl and the evaluation files to."""
    held_out: float = 0.3
    """Share of the APIs for evaluation alone; 0 is all for training, 1 all for evaluation."""
    seed: int = 0
    """Draws what is held out."""


@dataclass(frozen=True)
class SciKnowEvalArgs:
    """`sdft data sciknoweval SOURCE FOLDER`: multiple choice from a SciKnowEval file of yours."""

    source: tyro.conf.Positional[Path]
    """JSON or JSONL with question, choices and answerKey."""
    folder: tyro.conf.Positional[Path]
    """Folder to write train.jsonl and eval.jsonl to."""
    domain: str = ""
    """Only questions of this domain, such as Chemistry."""
    level: str = ""
    """Only questions of this level, such as L3."""
    held_out: float = 0.1
    """Share of the questions for evaluation alone; 0 is all for training, 1 all for evaluation."""
    seed: int = 0
    """Draws what is held out."""


@dataclass(frozen=True)
class KnowledgeArgs:
    """`sdft data knowledge SOURCE FOLDER`: articles of yours with questions about them."""

    source: tyro.conf.Positional[Path]
    """JSONL, an article a line; docs/tasks.md has the format."""
    folder: tyro.conf.Positional[Path]
    """Folder to write train.jsonl and the evaluation files to."""


DATA_ARGS: dict[str, type] = {
    "commands": SkillArgs,
    "facts": SkillArgs,
    "style": SkillArgs,
    "demo": DemoArgs,
    "toolalpaca": ToolAlpacaArgs,
    "sciknoweval": SciKnowEvalArgs,
    "knowledge": KnowledgeArgs,
}


@dataclass(frozen=True)
class MergeArgs:
    """`sdft merge ADAPTER FOLDER`: a LoRA adapter, merged into its base, as a plain Hugging Face model."""

    adapter: tyro.conf.Positional[str]
    """An adapter: the model folder of a LoRA run, or any peft LoRA adapter."""
    folder: tyro.conf.Positional[Path]
    """New folder to write."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the written weights; they are merged in float32."""


@dataclass(frozen=True)
class ConvertArgs:
    """`sdft convert gguf FILE.gguf FOLDER`: a GGUF model as a Hugging Face folder."""

    kind: tyro.conf.Positional[Literal["gguf"]]
    """The format of the file."""
    source: tyro.conf.Positional[Path]
    """File to read."""
    target: tyro.conf.Positional[Path]
    """New folder to write."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a mistake of the user's is one line on stderr and exit status 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train_command,
        "plan": plan_command,
        "check": check_command,
        "study": study_command,
        "eval": eval_command,
        "generate": generate_command,
        "data": data_command,
        "merge": merge_command,
        "convert": convert_command,
    }
    if not args or args[0] in ("-h", "--help"):
        print(OVERVIEW)
        return
    if args[0] in ("-V", "--version"):
        print(f"sdft {__version__}")
        return
    try:
        if args[0] not in commands:
            raise SdftError(f"unknown command {args[0]!r}; valid: {', '.join(commands)}")
        quiet_libraries()
        commands[args[0]](args[1:])
    except SdftError as error:
        print(f"sdft: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def quiet_libraries() -> None:
    """No telemetry, and none of transformers' notes about matters the user cannot act on."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Short forms of settings that are mostly given on the command line.
ALIASES = {
    "--resume": "--train.resume",
    "--guard": "--eval.guard",
    "--max-drop": "--eval.max-drop",
}


def config_from(args: list[str]) -> tuple[Config, list[str]]:
    """The config of a command line CONFIG.toml [overrides], and the overrides that are left to parse."""
    if not args or args[0].startswith("-"):
        if {"-h", "--help"} & set(args):
            return Config(), ["--help"]
        raise SdftError("the config file is missing; it comes first: sdft train CONFIG.toml [--optim.lr 2e-5 ...]")
    flags = [a.partition("=") for a in args[1:]]
    return load_config(args[0]), [
        ALIASES.get(flag.replace("_", "-"), flag) + sign + value for flag, sign, value in flags
    ]


def parse(kind: type[Kind], args: list[str], prog: str, default: Kind | None = None) -> Kind:
    """The options of a command line. Raises SdftError for a value out of range; exits with 2 for an unknown option."""
    with located("command line"):
        return (
            tyro.cli(kind, args=args, prog=prog)
            if default is None
            else tyro.cli(kind, args=args, prog=prog, default=default)
        )


def train_command(args: list[str]) -> None:
    config, rest = config_from(args)
    parsed = parse(Config, rest, "sdft train CONFIG.toml", config)
    check_preset(config, parsed)
    from sdft.training.loop import train

    train(parsed, memory_advice)


def memory_advice(config: Config) -> str:
    """What to change in a config that ran out of memory."""
    from sdft.planning import plan

    return plan.advice_after_running_out(config)


def check_preset(file: Config, parsed: Config) -> None:
    """Raises SdftError for a preset among the overrides: the file's settings would hide what it sets."""
    if parsed.preset != file.preset:
        raise SdftError(f"--preset {parsed.preset} has no effect here; write preset = '{parsed.preset}' into the file")


def plan_command(args: list[str]) -> None:
    config, rest = config_from(args)
    a = parse(PlanArgs, rest, "sdft plan CONFIG.toml", PlanArgs(config=config))
    check_preset(config, a.config)
    if not show_plan(a):
        raise SystemExit(1)


def show_plan(a: PlanArgs) -> bool:
    """Prints the plan of a config; returns whether it fits."""
    from sdft.planning import plan

    config = a.config
    unused = {"train.output": config.train.output or "unused"}
    if a.prompt_tokens:
        unused["data.train"] = config.data.train or "unused"
    validate(override(config, unused))
    memory = plan.parse_size(a.memory) if a.memory else 0
    shape = plan.shape_of(config)
    if a.prompt_tokens:
        answer = config.rollout.max_new_tokens
        work = plan.Work.uniform(config, a.prompt_tokens, a.teacher_prompt_tokens or a.prompt_tokens + answer, answer)
    else:
        work = plan.work_of(config)
    machine = plan.this_machine(config, memory)
    found = plan.predict(shape, config, work, machine)
    if a.json:
        print(json.dumps(asdict(found)))
        return found.fits
    from rich.console import Console

    console = Console()
    for part in plan.picture(found):
        console.print(part)
    for line in found.notes:
        print(f"Assumed: {line}.")
    print(plan.verdict(found, config))
    for line in plan.advice(shape, config, work, machine):
        print(f"- {line}")
    return found.fits


def check_command(args: list[str]) -> None:
    config, rest = config_from(args)
    parsed = parse(CheckArgs, rest, "sdft check CONFIG.toml", CheckArgs(config=config))
    check_preset(config, parsed.config)
    if not check(parsed.config, parsed.count, parsed.show):
        raise SystemExit(1)


def check(config: Config, count: int = 32, show: int = 3) -> bool:
    """Teacher uplift on `count` training records; prints examples and a verdict, returns it."""
    from rich.console import Console
    from rich.table import Table

    from sdft.data.formats import load_records
    from sdft.data.prompts import encode_chat, set_chat_template, teacher_messages
    from sdft.evaluation import accuracy
    from sdft.model import loading

    validate(replace(config, train=replace(config.train, output=config.train.output or "unused")))
    if config.teacher.context == "none":
        raise SdftError("teacher.context = 'none' shows no demonstration; there is nothing to check")
    records = load_records(config.data.train, config.data.split)
    picked = [records[i * len(records) // min(count, len(records))] for i in range(min(count, len(records)))]
    for example in picked:
        if not example.demonstrations:
            raise SdftError(f"{example.source}: 'demonstration' is missing; the check compares with and without it")
    accuracy.check_evaluable(picked, config.data.train)
    tokenizer, stop_ids = loading.load_tokenizer(config.model)
    set_chat_template(tokenizer, config.data.chat_template)
    model = loading.load(config.model, tokenizer, stop_ids)
    asked = accuracy.student_prompts(tokenizer, picked, config.data.system)
    shown = [encode_chat(tokenizer, teacher_messages(e, config.teacher, config.data.system), e.source) for e in picked]
    c = config.eval
    results = [
        accuracy.evaluate(model, tokenizer, picked, prompts, c.max_new_tokens, c.batch_size)
        for prompts in (asked, shown)
    ]
    uplift = accuracy.Uplift(*results)
    table = Table("request", "expected", "student", "teacher", title=f"Greedy answers ({config.teacher.context})")
    for student, teacher in list(zip(uplift.student.answers, uplift.teacher.answers, strict=True))[:show]:
        table.add_row(
            *(_clip(t) for t in (student.prompt, "".join(student.expected[:1]), student.given, teacher.given))
        )
    Console().print(table, markup=False)
    works, words = uplift.verdict()
    print(f"Can SDFT work here? {words}")
    return works


def _clip(text: str, width: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def study_command(args: list[str]) -> None:
    a = parse(StudyArgs, args, "sdft study")
    from sdft.study import report, study

    if a.tflops <= 0 or a.prompt_tokens < 0 or bool(a.prompt_tokens) != bool(a.records):
        raise SdftError("--tflops must be above 0, and --prompt-tokens and --records go together")
    needs_data = not a.list and not (a.plan and a.prompt_tokens)
    found = study.load_study(a.study, a.model, a.output, needs_data)
    if a.plan:
        print(plan_of_study(a, found))
        return
    if a.list:
        for cell in study.cells(found):
            done = sum(study.finished(found, cell, number) for number in range(len(found.tasks)))
            why = study.failure(found, cell)
            print(f"{cell.name}: {done} of {len(found.tasks)} stages" + f"; {why}" * bool(why))
        return
    if not a.report:
        study.run_study(found, a.only)
        text = study.table(found)
        (found.output / "table.md").write_text(text)
        print(f"\n{text}")
    print(f"Report: {report.write_report(found)} and report.html beside it")


def plan_of_study(a: StudyArgs, found: Any) -> str:
    from sdft.planning import plan
    from sdft.study import study

    size = plan.parse_size(a.memory) if a.memory else 0
    machine = plan.this_machine(override(found.config, {"model.device": "cuda"} if size else {}), size)
    planned = study.plan_study(found, machine, a.prompt_tokens, a.teacher_prompt_tokens, a.records)
    return study.plan_table(planned, machine.memory, a.tflops)


def eval_command(args: list[str]) -> None:
    a = parse(EvalArgs, args, "sdft eval")
    if not a.data and not a.harness:
        raise SdftError("nothing to evaluate on; give DATA.jsonl, or --harness with tasks such as hellaswag,winogrande")
    from sdft.data.formats import load_records
    from sdft.evaluation import accuracy, harness

    if a.samples < 0 or (a.samples and a.temperature <= 0):
        raise SdftError(
            f"--samples {a.samples} --temperature {a.temperature:g}: give 1 sample or more, at a temperature above 0"
        )
    examples = load_records(a.data) if a.data else []
    accuracy.check_evaluable(examples, a.data)
    if a.harness:
        harness.check(task_names(a), a.limit, a.include_path)
    config = eval_config(a)
    tokenizer, model = _load(config.model, config.data.chat_template, needs_chat=bool(examples) or a.chat)
    if examples:
        eval_records(a, tokenizer, model, examples, config.data.system)
    if a.harness:
        eval_harness(a, tokenizer, model)


def eval_config(a: EvalArgs) -> Config:
    """What to load and how to ask: that of the model named, or of a config, with the command line's over it."""
    config = load_config(a.model) if a.model.endswith(".toml") else override(Config(), {"model.name": a.model})
    if not config.model.name:
        raise SdftError(f"{a.model}: model.name is missing")
    given = {"model.compute_dtype": a.compute_dtype, "model.device": a.device, "data.system": a.system}
    return override(config, {key: value for key, value in given.items() if value not in ("auto", "")})


def task_names(a: EvalArgs) -> list[str]:
    """The tasks of --harness."""
    return [name.strip() for name in a.harness.split(",") if name.strip()]


def eval_records(a: EvalArgs, tokenizer: Any, model: Any, examples: list[Any], system: str) -> None:
    """Greedy answers to the records; prints some, writes all, prints the accuracy."""
    from sdft.data.formats import write_jsonl
    from sdft.evaluation import accuracy

    prompts = accuracy.student_prompts(tokenizer, examples, system)
    result = accuracy.evaluate(model, tokenizer, examples, prompts, a.max_new_tokens, a.batch_size)
    for answer in result.answers[: a.show]:
        print(f"[{'ok' if answer.correct else '--'}] {_clip(answer.prompt)}\n     {_clip(answer.given)}")
    if a.output:
        write_jsonl(Path(a.output), [asdict(answer) for answer in result.answers])
    right = sum(answer.correct for answer in result.answers)
    print(f"accuracy {result.accuracy:.1%} ({right} of {len(result.answers)})")
    if a.samples:
        from sdft.config import RolloutConfig
        from sdft.evaluation.pass_at_k import sample_answers

        sampling = RolloutConfig(
            temperature=a.temperature, top_p=a.top_p, max_new_tokens=a.max_new_tokens, batch_size=a.batch_size
        )
        drawn = sample_answers(model, tokenizer, examples, prompts, a.samples, sampling, a.seed)
        found = "  ".join(f"pass@{k} {drawn.pass_at(k):.1%}" for k in drawn.powers())
        print(f"of {a.samples} samples at temperature {a.temperature:g}: {found}")


def eval_harness(a: EvalArgs, tokenizer: Any, model: Any) -> None:
    """Prints the scores of lm_eval's tasks."""
    from sdft.evaluation import harness

    found = harness.run(
        model, tokenizer, task_names(a), a.limit, a.include_path, a.fewshot, a.chat, a.allow_code,
        batch_size=a.batch_size,
    )  # fmt: skip
    for task, scores in found.items():
        for metric, score in scores.items():
            print(
                f"{task}  {metric}  {score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")
            )
    if a.json:
        print(json.dumps({task: {k: asdict(v) for k, v in scores.items()} for task, scores in found.items()}))


def generate_command(args: list[str]) -> None:
    a = parse(GenerateArgs, args, "sdft generate")
    import torch

    from sdft.config import RolloutConfig
    from sdft.data.prompts import encode_chat
    from sdft.data.records import Message
    from sdft.rollout.sampling import generate

    tokenizer, model = _load(ModelConfig(name=a.model, device=a.device))
    messages = [Message(role="system", content=a.system)] if a.system else []
    prompt = encode_chat(tokenizer, [*messages, Message(role="user", content=a.prompt)], "prompt")
    torch.manual_seed(a.seed)
    sampling = RolloutConfig(max_new_tokens=a.max_new_tokens, temperature=a.temperature, top_p=a.top_p)
    for completion in generate(model, [prompt] * a.count, sampling):
        print(tokenizer.decode(completion.ids, skip_special_tokens=True))


def _load(config: ModelConfig, template: str = "", needs_chat: bool = True) -> tuple[Any, Any]:
    from sdft.data.prompts import set_chat_template
    from sdft.model import loading

    tokenizer, stop_ids = loading.load_tokenizer(config)
    if template or needs_chat:
        set_chat_template(tokenizer, template)
    return tokenizer, loading.load(config, tokenizer, stop_ids)


def data_command(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        for shown in dict.fromkeys(DATA_ARGS.values()):
            print(shown.__doc__)
        print("\n`sdft data TASK --help` explains the options of a task.")
        return
    task, rest = args[0], args[1:]
    if task not in DATA_ARGS:
        raise SdftError(f"unknown task {task!r}; valid: {', '.join(DATA_ARGS)}")
    a: Any = parse(DATA_ARGS[task], rest, f"sdft data {task}")
    from sdft.data import skills, tasks

    options = {key: value for key, value in vars(a).items() if key != "folder"}
    made = tasks.made_up(task, **options) if task in skills.SKILLS else getattr(tasks, task)(**options)
    print("\n".join(tasks.write(made, a.folder)))


def merge_command(args: list[str]) -> None:
    a = parse(MergeArgs, args, "sdft merge")
    from sdft.model.loading import merge_folder

    merge_folder(a.adapter, a.folder, a.dtype)
    print(f"model in {a.folder}")


def convert_command(args: list[str]) -> None:
    a = parse(ConvertArgs, args, "sdft convert")
    if not a.source.exists():
        raise SdftError(f"{a.source}: no such file")
    from sdft.model.loading import convert_gguf

    if a.target.exists():
        raise SdftError(f"{a.target} exists; give a new folder")
    a.target.parent.mkdir(parents=True, exist_ok=True)
    convert_gguf(a.source.resolve(), a.target)
    print(f"model in {a.target}")
