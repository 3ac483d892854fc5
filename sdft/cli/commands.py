"""Each command: its options, one call, what it prints, its exit status."""

import difflib
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from sdft.cli.arguments import (
    DATA_ARGS,
    CheckArgs,
    ConvertArgs,
    EvalArgs,
    GenerateArgs,
    MergeArgs,
    PlanArgs,
    StudyArgs,
)
from sdft.config import Config, ModelConfig, Settings, load_config, located, override
from sdft.config.settings import keys, nearest
from sdft.errors import SdftError

if TYPE_CHECKING:
    from sdft.study.spec import Study

Kind = TypeVar("Kind", bound=Settings)

# Short forms of settings that are mostly given on the command line.
ALIASES = {
    "--resume": "--train.resume",
    "--guard": "--eval.guard",
    "--max-drop": "--eval.max-drop",
}


def parse(kind: type[Kind], args: list[str], command: str, default: Kind | None = None) -> Kind:
    """The options of a command. Raises SdftError for a value out of range and for an unknown option.

    Exits with status 2 for a value that is not of the option's type, and with 0 after --help.
    """
    start = tyro.MISSING_NONPROP if default is None else default
    with located("command line"):
        found, unknown = tyro.cli(kind, args=args, prog=f"sdft {command}", default=start, return_unknown_args=True)
        if unknown:
            raise SdftError(f"unknown option {unknown[0]!r}; {_known(kind, unknown[0], command)}")
    return found


def _known(kind: type[Settings], option: str, command: str) -> str:
    """The option that was probably meant."""
    section, _, name = option.lstrip("-").partition("=")[0].replace("-", "_").rpartition(".")
    options = {key: field for key, field in kind.declared().items() if key != "config"}
    if kind is Config or "config" in kind.declared():
        options |= keys()
    here = [key for key in options if key.rpartition(".")[0] == section]
    near = nearest(name, here, options) if option.startswith("-") else None
    if near:
        return f"did you mean '--{near.replace('_', '-')}'?"
    return f"`sdft {command.removesuffix(' CONFIG.toml')} --help` lists the options"


def config_from(args: list[str]) -> tuple[Config, list[str]]:
    """The config of a command line CONFIG.toml [overrides], and the overrides that are left to parse."""
    if not args or args[0].startswith("-"):
        if {"-h", "--help"} & set(args):
            return Config(), ["--help"]
        raise SdftError("the config file is missing; it comes first: sdft train CONFIG.toml [--optim.lr 2e-5 ...]")
    config, rest = take_sets(load_config(args[0]), args[1:])
    flags = [a.partition("=") for a in rest]
    return config, [ALIASES.get(flag.replace("_", "-"), flag) + sign + value for flag, sign, value in flags]


def take_sets(config: Config, args: list[str]) -> tuple[Config, list[str]]:
    """The config with the sets of `--eval.sets new=n.jsonl prior=p.jsonl`, and the other arguments.

    `new n.jsonl` instead of `new=n.jsonl` is the same. tyro takes only that form, and only if the file has no sets.
    """
    sets: dict[str, str] = {}
    rest: list[str] = []
    words = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--eval.sets=") else [arg])]
    while words:
        word = words.pop(0)
        if word != "--eval.sets":
            rest.append(word)
            continue
        while words and not words[0].startswith("-"):
            name, _, file = words.pop(0).partition("=")
            if not file and words and not words[0].startswith("-"):
                file = words.pop(0)
            sets[name] = file
        if not sets or not all(sets.values()):
            raise SdftError(
                "command line: --eval.sets takes NAME=FILE, such as --eval.sets new=new.jsonl prior=prior.jsonl"
            )
    return (override(config, {"eval.sets": sets}) if sets else config), rest


def check_preset(file: Config, parsed: Config) -> None:
    """Raises SdftError for a preset among the overrides: the settings of the file would hide what it sets."""
    if parsed.preset != file.preset:
        raise SdftError(f"--preset {parsed.preset} has no effect here; write preset = '{parsed.preset}' into the file")


def train_command(args: list[str]) -> None:
    """Trains."""
    config, rest = config_from(args)
    parsed = parse(Config, rest, "train CONFIG.toml", config)
    check_preset(config, parsed)
    from sdft import api

    api.train(parsed)


def plan_command(args: list[str]) -> None:
    """Prints the plan of a run; exits with 1 if the run does not fit."""
    config, rest = config_from(args)
    a = parse(PlanArgs, rest, "plan CONFIG.toml", PlanArgs(config=config))
    check_preset(config, a.config)
    from sdft import api
    from sdft.cli import show

    found = api.plan(
        a.config, a.memory or 0, prompt_tokens=a.prompt_tokens, teacher_prompt_tokens=a.teacher_prompt_tokens
    )
    if a.json:
        print(json.dumps(asdict(found.plan)))
    else:
        show.plan(found)
    if not found.fits:
        raise SystemExit(1)


def check_command(args: list[str]) -> None:
    """Prints the uplift of the teacher; exits with 1 if SDFT cannot work."""
    config, rest = config_from(args)
    a = parse(CheckArgs, rest, "check CONFIG.toml", CheckArgs(config=config))
    check_preset(config, a.config)
    from sdft import api
    from sdft.cli import show

    found = api.check(a.config, a.count)
    show.check(found, a.config.teacher.context, a.show)
    if not found.works:
        raise SystemExit(1)


def study_command(args: list[str]) -> None:
    """Runs a study, or prints what it would run or has finished."""
    a = parse(StudyArgs, args, "study")
    if bool(a.prompt_tokens) != bool(a.records):
        raise SdftError("--prompt-tokens and --records go together; give both or neither")
    from sdft.study import report, results, spec

    needs_data = not a.list and not (a.plan and a.prompt_tokens)
    found = spec.load_study(a.study, a.model, a.output, needs_data)
    if a.plan:
        print(plan_of_study(a, found))
        return
    if a.list:
        for cell in spec.cells(found):
            done = sum(results.is_finished(found, cell, number) for number in range(len(found.tasks)))
            why = results.failure(found, cell)
            print(f"{cell.name}: {done} of {len(found.tasks)} stages" + f"; {why}" * bool(why))
        return
    if not a.report:
        from sdft.study.run import run_study

        run_study(found, a.only)
        text = results.table(found)
        (found.output / "table.md").write_text(text)
        print(f"\n{text}")
    print(f"Report: {report.write_report(found)} and report.html in the same folder")


def plan_of_study(a: StudyArgs, found: "Study") -> str:
    """Peak memory and time of every distinct run, as a table."""
    from sdft.planning.machine import parse_size, this_machine
    from sdft.study.plan import Sizes, plan_study, plan_table

    size = parse_size(a.memory) if a.memory else 0
    machine = this_machine(override(found.config, {"model.device": "cuda"} if size else {}), size)
    planned = plan_study(found, machine, Sizes(a.prompt_tokens, a.teacher_prompt_tokens, a.records))
    return plan_table(planned, machine.memory, a.tflops)


def eval_command(args: list[str]) -> None:
    """Prints the accuracy on records, the scores of the harness, or both."""
    a = parse(EvalArgs, args, "eval")
    if not a.data and not a.harness:
        raise SdftError("nothing to evaluate on; give DATA.jsonl, or --harness with tasks such as hellaswag,winogrande")
    from sdft import api
    from sdft.cli import show
    from sdft.data.formats import write_jsonl
    from sdft.evaluation import harness

    # Both before the model is loaded.
    if a.data:
        api.read_evaluation(a.data)
    if a.harness:
        harness.check(a.tasks(), a.limit, a.include_path)
    config = eval_config(a)
    model = api.load_model(config.model, config.data.chat_template, needs_chat=bool(a.data) or a.chat)
    if a.data:
        found = api.evaluate(
            model, a.data, system=config.data.system, max_new_tokens=a.max_new_tokens, batch_size=a.batch_size,
            samples=a.samples, temperature=a.temperature, top_p=a.top_p, seed=a.seed,
        )  # fmt: skip
        if a.output:
            write_jsonl(Path(a.output), [asdict(answer) for answer in found.greedy.answers])
        show.evaluation(found, a.show, a.temperature)
    if a.harness:
        scores = api.evaluate_harness(
            model, a.tasks(), limit=a.limit, include_path=a.include_path, fewshot=a.fewshot, chat=a.chat,
            allow_code=a.allow_code, batch_size=a.batch_size,
        )  # fmt: skip
        show.scores(scores)
        if a.json:
            print(json.dumps({task: {k: asdict(v) for k, v in found.items()} for task, found in scores.items()}))


def eval_config(a: EvalArgs) -> Config:
    """The model to load and the system message: of the model or the config that is named, then of the options."""
    config = load_config(a.model) if a.model.endswith(".toml") else override(Config(), {"model.name": a.model})
    if not config.model.name:
        raise SdftError(f"{a.model}: model.name is missing")
    given = {"model.compute_dtype": a.compute_dtype, "model.device": a.device, "data.system": a.system}
    return override(config, {key: value for key, value in given.items() if value not in ("auto", "")})


def generate_command(args: list[str]) -> None:
    """Prints completions."""
    a = parse(GenerateArgs, args, "generate")
    from sdft import api

    for found in api.generate(
        ModelConfig(name=a.model, device=a.device), a.prompt, count=a.count, system=a.system,
        max_new_tokens=a.max_new_tokens, temperature=a.temperature, top_p=a.top_p, seed=a.seed,
    ):  # fmt: skip
        print(found.text)


def data_command(args: list[str]) -> None:
    """Writes the records of a task."""
    if not args or args[0] in ("-h", "--help"):
        for shown in dict.fromkeys(DATA_ARGS.values()):
            print(shown.__doc__)
        print("\n`sdft data TASK --help` explains the options of a task.")
        return
    task, rest = args[0], args[1:]
    if task not in DATA_ARGS:
        near = difflib.get_close_matches(task, DATA_ARGS, n=1)
        raise SdftError(
            f"unknown task {task!r}; " + (f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(DATA_ARGS)}")
        )
    a: Any = parse(DATA_ARGS[task], rest, f"data {task}")
    from sdft.data import skills, tasks

    options = {f.name: getattr(a, f.name) for f in fields(a) if f.name != "folder"}
    made = tasks.made_up(task, **options) if task in skills.SKILLS else getattr(tasks, task)(**options)
    print("\n".join(tasks.write(made, a.folder)))


def merge_command(args: list[str]) -> None:
    """Writes an adapter and its base as one model."""
    a = parse(MergeArgs, args, "merge")
    from sdft.model.saving import merge_folder

    merge_folder(a.adapter, a.folder, a.dtype)
    print(f"model in {a.folder}")


def convert_command(args: list[str]) -> None:
    """Writes a model of another format as a Hugging Face folder."""
    a = parse(ConvertArgs, args, "convert")
    if not a.source.exists():
        raise SdftError(f"{a.source}: no such file")
    if a.target.exists():
        raise SdftError(f"{a.target} exists; give a new folder")
    from sdft.model.sources import convert_gguf

    a.target.parent.mkdir(parents=True, exist_ok=True)
    convert_gguf(a.source.resolve(), a.target)
    print(f"model in {a.target}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
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
