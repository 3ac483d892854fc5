"""Settings: precedence, round trip, what each mistake is answered with."""

import ast
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft import config as module
from sdft.config import PRESETS, Config, config_keys, describe, load_config, to_toml, validate
from sdft.errors import SdftError

KEYS = """
preset
model.name model.weights_dtype model.compute_dtype model.device model.attention model.gradient_checkpointing
model.activation_offload model.quantize model.trust_remote_code
lora.rank lora.alpha lora.dropout lora.targets lora.rslora lora.dora lora.modules_to_save lora.earlier
data.train data.split data.chat_template data.system data.max_prompt_tokens data.over_length
teacher.kind teacher.ema_alpha teacher.model teacher.context teacher.turns teacher.request teacher.template
teacher.max_prompt_tokens teacher.offload
rollout.source rollout.per_prompt rollout.max_new_tokens rollout.temperature rollout.top_p rollout.top_k
rollout.batch_size
loss.method loss.divergence loss.beta loss.temperature loss.mask_first loss.average loss.chunk_bytes loss.impl
optim.name optim.offload optim.lr optim.schedule optim.warmup_steps
optim.min_lr_ratio optim.weight_decay optim.betas optim.eps optim.clip_norm
eval.sets eval.every eval.max_new_tokens eval.batch_size eval.guard eval.max_drop
train.output train.steps train.epochs train.batch_size train.micro_batch_tokens train.packing train.seed
train.save_every train.keep_checkpoints train.keep_best train.resume train.resume_step train.on_nonfinite train.trackers
"""


def read(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return load_config(path)


def test_the_options_are_frozen() -> None:
    """A renamed or removed option breaks users' files: change this list knowingly."""
    assert config_keys() == KEYS.split()


def test_every_field_is_documented_where_it_is_declared() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
    declared = 0
    for node in classes:
        for line, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign):
                declared += 1
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                )
                table = isinstance(line.value, ast.Call) and ast.unparse(line.annotation).endswith("Config")
                assert table or len(text) > 10, f"{node.name}.{ast.unparse(line.target)} has no docstring"
    assert declared == len(KEYS.split()) + 9  # and the nine tables


def test_import_is_light() -> None:
    code = "import sys, sdft.config; print([m for m in ('torch', 'transformers', 'numpy', 'tyro') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Precedence and round trip.


def test_defaults_preset_file(tmp_path: Path) -> None:
    config = read(tmp_path, 'preset = "paper_as_run"\n[loss]\nmask_first = 5\n[teacher]\nema_alpha = 0.5')
    assert (config.loss.mask_first, config.teacher.ema_alpha) == (5, 0.5)  # the file over the preset
    assert (config.loss.divergence, config.loss.average) == ("forward_kl", "sequence")  # the preset over the defaults
    assert config.optim.lr == Config().optim.lr


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "") == Config()


@pytest.mark.parametrize(
    ("preset", "loss"),
    [("paper_as_written", ("reverse_kl", "token", 0)), ("paper_as_run", ("forward_kl", "sequence", 3))],
)
def test_presets_are_the_paper(tmp_path: Path, preset: str, loss: tuple[Any, ...]) -> None:
    c = read(tmp_path, f'preset = "{preset}"')
    assert (c.loss.divergence, c.loss.average, c.loss.mask_first) == loss
    assert (c.teacher.kind, c.teacher.ema_alpha, c.teacher.context) == ("ema", 0.01, "in_prompt")
    assert (c.rollout.source, c.rollout.per_prompt, c.rollout.temperature) == ("student", 1, 1.0)
    assert (c.optim.schedule, c.optim.warmup_steps, c.optim.clip_norm, c.optim.weight_decay) == ("cosine", 10, 1.0, 0.0)
    assert (
        set(PRESETS) == {"paper_as_written", "paper_as_run"} == set(get_args(get_type_hints(Config)["preset"])) - {""}
    )


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a config field's type."""
    if is_dataclass(kind):
        return st.builds(kind, **{f.name: values(get_type_hints(kind)[f.name]) for f in fields(kind)})
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, args))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    if origin is dict:
        return st.dictionaries(text, values(args[1]), max_size=2)
    simple = {str: text, int: st.integers(-(2**40), 2**40), float: st.floats(allow_nan=False), bool: st.booleans()}
    return simple[kind]


@given(config=values(Config))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "round.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config
    assert all(type(a) is type(b) for a, b in zip(asdict(load_config(path)), asdict(config), strict=True))


def test_integers_become_floats(tmp_path: Path) -> None:
    lr = read(tmp_path, "[optim]\nlr = 1\n").optim.lr
    assert lr == 1.0
    assert isinstance(lr, float)


# Mistakes.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optim]\nlearning_rat = 1\n", "unknown key 'optim.learning_rat'; valid here: optim.name, optim.offload"),
        ("[optim]\nwarmup_step = 1\n", "unknown key 'optim.warmup_step'; did you mean 'optim.warmup_steps'?"),
        ("[optimm]\nlr = 1\n", "unknown key 'optimm'; did you mean 'optim'?"),
        ("[train]\nlr = 1\n", "unknown key 'train.lr'; did you mean 'optim.lr'?"),
        ("lr = 1\n", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("[loss]\nema_alpa = 1\n", "unknown key 'loss.ema_alpa'; did you mean 'teacher.ema_alpha'?"),
        ("optim = 3\n", "optim must be a table, [optim], not 3"),
        ("[optim]\nlr = 'x'\n", "optim.lr = 'x' must be of type float"),
        ("[optim]\nlr = true\n", "optim.lr = True must be of type float"),
        ("[train]\nsteps = 1.5\n", "train.steps = 1.5 must be of type int"),
        ("[train]\nsteps = true\n", "train.steps = True must be of type int"),
        ("[train]\nresume = 1\n", "train.resume = 1 must be of type bool"),
        ("[model]\nname = 3\n", "model.name = 3 must be of type str"),
        ("[teacher]\nkind = 'emma'\n", "teacher.kind = 'emma' is not one of 'ema', 'base', 'live'"),
        ("[teacher]\nkind = ['ema']\n", "teacher.kind = ['ema'] is not one of"),
        ("[train]\ntrackers = ['x']\n", "train.trackers = 'x' is not one of 'tensorboard', 'wandb'"),
        ("[lora]\ntargets = 'q_proj'\n", "lora.targets = 'q_proj' must be a list"),
        ("[optim]\nbetas = [0.9]\n", "optim.betas = [0.9] must have 2 entries"),
        ("[optim]\nbetas = [0.9, 'x']\n", "optim.betas = 'x' must be of type float"),
        ("[eval]\nsets = 'x'\n", "eval.sets = 'x' must be a table"),
        ("[eval.sets]\nnew = 3\n", "eval.sets.new = 3 must be of type str"),
        ("preset = 'paper'\n", "preset = 'paper' is unknown; valid: paper_as_written, paper_as_run"),
        ("preset = 3\n", "preset = 3 is unknown"),
        ("preset = []\n", "preset = []"),
        ("[optim\n", "not valid TOML: "),
    ],
)  # fmt: skip
def test_bad_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SdftError) as error:
        read(tmp_path, text)
    assert f"config {tmp_path / 'c.toml'}: " in str(error.value)
    assert words in str(error.value)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(SdftError, match=r"none\.toml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(SdftError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[model]\nname = "\xe9"\n')
    with pytest.raises(SdftError, match="not valid TOML"):
        load_config(tmp_path / "latin.toml")


VALID = {"model.name": "m", "data.train": "d.jsonl", "train.output": "o"}


def test_a_minimal_config_is_valid(changed: Any) -> None:
    validate(changed(Config(), **VALID))


NAN = float("nan")
BAD = {
    "model.name": [""],
    "data.train": [""],
    "train.output": [""],
    "train.steps": [-1],
    "train.epochs": [0.0, -1.0, NAN],
    "train.batch_size": [0],
    "train.micro_batch_tokens": [-1],
    "train.resume_step": [-1],
    "train.save_every": [-1],
    "train.keep_checkpoints": [0],
    "optim.lr": [0.0, -1e-5, NAN],
    "optim.warmup_steps": [-1],
    "optim.min_lr_ratio": [-0.1, 1.1, NAN],
    "optim.weight_decay": [-0.1],
    "optim.betas": [(1.0, 0.9), (0.9, -0.1)],
    "optim.eps": [0.0, -1e-8],
    "optim.clip_norm": [-1.0],
    "loss.beta": [-0.1, 1.1],
    "loss.temperature": [0.0, -1.0],
    "loss.mask_first": [-1, 256],
    "loss.chunk_bytes": [-1],
    "teacher.ema_alpha": [0.0, 1.1, NAN],
    "teacher.turns": [0],
    "teacher.max_prompt_tokens": [0],
    "rollout.per_prompt": [0],
    "rollout.max_new_tokens": [0],
    "rollout.batch_size": [0],
    "rollout.temperature": [-0.1],
    "rollout.top_p": [0.0, 1.1],
    "rollout.top_k": [-1],
    "lora.rank": [-1],
    "lora.alpha": [0.0],
    "lora.dropout": [-0.1, 1.0],
    "data.max_prompt_tokens": [0],
    "eval.every": [-1],
    "eval.max_new_tokens": [0],
    "eval.max_drop": [-1.0, NAN],
    "eval.batch_size": [0],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, bad in BAD.items() for value in bad])
def test_out_of_range(changed: Any, key: str, value: Any) -> None:
    with pytest.raises(SdftError) as error:
        validate(changed(Config(), **VALID | {key: value}))
    assert str(error.value).startswith(f"{key} = {value!r} ")


EDGES = {
    "optim.min_lr_ratio": 1.0, "optim.betas": (0.0, 0.0), "loss.beta": 1.0, "loss.mask_first": 255,
    "teacher.ema_alpha": 1.0, "rollout.temperature": 0.0, "rollout.top_p": 1.0, "optim.clip_norm": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("key", EDGES)
def test_edges_are_valid(changed: Any, key: str) -> None:
    validate(changed(Config(), **VALID | {key: EDGES[key]}))


OTHER = {"teacher.model": "m", "teacher.kind": "base"}
SETS: dict[str, Any] = {"eval.sets": {"new": "a", "old": "b"}, "eval.every": 1}


@pytest.mark.parametrize("best", ["new", "old", "mean", ""])
def test_the_best_of_a_set_or_of_all(changed: Any, best: str) -> None:
    validate(changed(Config(), **VALID | SETS | {"train.keep_best": best}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval.every": 1}, "eval.sets = {} is empty though eval.every is set"),
        ({"train.resume_step": 3}, "train.resume_step = 3 has no effect alone; add --resume"),
        ({"train.keep_best": "new"}, "train.keep_best = 'new' is none of eval.sets: there are none"),
        (SETS | {"train.keep_best": "nwe"}, "train.keep_best = 'nwe' is none of eval.sets: new, old"),
        (
            SETS | {"train.keep_best": "new", "eval.every": 0},
            "train.keep_best = 'new' needs evaluations; set eval.every",
        ),
        (SETS | {"train.keep_best": "mean", "eval.sets": {"mean": "a"}}, "is the mean, and a set; rename the set"),
        ({"teacher.context": "template", "teacher.template": "{request}"}, "has no {demonstration}"),
        ({"teacher.context": "template", "teacher.template": "{demonstration}"}, "has no {request}"),
        ({"teacher.request": "no place for it"}, "teacher.request = 'no place for it' has no {request}"),
        ({"teacher.template": "{request} {demonstration}"}, "teacher.context is not 'template'"),
        ({"optim.offload": True, "optim.name": "adamw_8bit"}, "optim.offload = true goes with optim.name = 'adamw'"),
        ({"teacher.offload": True, "teacher.kind": "base"}, "teacher.kind = 'base' has none; drop it"),
        ({"lora.dora": True}, "lora.dora = True has no effect without an adapter; set lora.rank above 0"),
        ({"lora.rslora": True}, "lora.rslora = True has no effect without an adapter"),
        ({"lora.modules_to_save": ("lm_head",)}, "lora.modules_to_save = ('lm_head',) has no effect without"),
        ({"lora.earlier": "stack"}, "lora.earlier = 'stack' needs a new adapter; set lora.rank above 0"),
        ({"lora.earlier": "stack", "lora.rank": 2, "lora.dora": True}, "lora.dora = True does not add to another"),
        ({"lora.rank": 2, "model.name": "a.gguf"}, "cannot name a GGUF file as its base; run `sdft convert gguf"),
        ({"model.quantize": "4bit"}, "model.quantize = '4bit' freezes the weights; set lora.rank above 0"),
        ({"model.quantize": "4bit", "lora.rank": 2, "lora.earlier": "merge"}, "would round the adapter into 4-bit"),
        ({"loss.method": "sft", "rollout.source": "mixed"}, "rollout.source = 'mixed' has no effect with loss.method"),
        ({"loss.method": "dft", "rollout.source": "teacher"}, "set 'offline' to train on the teacher's answers"),
        ({"teacher.context": "none"}, "makes the teacher the student itself, which has nothing to teach"),
        ({"teacher.model": "m", "loss.method": "dft"}, "teacher.model = 'm' has no effect with loss.method = 'dft'"),
        ({"teacher.model": "m"}, "teacher.model = 'm' goes with teacher.kind = 'base', not 'ema'"),
        (OTHER | {"lora.rank": 2}, "teacher.model = 'm' needs full fine-tuning, and lora.rank = 2"),
        (OTHER | {"lora.earlier": "continue"}, "needs full fine-tuning, and lora.earlier = 'continue'"),
        ({"eval.guard": "g.jsonl"}, "eval.guard = 'g.jsonl' needs evaluations; set eval.every"),
        ({"eval.max_drop": 5.0}, "eval.max_drop = 5.0 has no effect without eval.guard"),
        ({"eval.guard": "g", "eval.every": 1, "eval.sets": {"guard": "x"}}, "eval.sets has another one"),
        ({"eval.guard": "g", "eval.every": 1, "train.keep_best": "guard"}, "is none of eval.sets"),
    ],
)
def test_settings_that_do_not_go_together(changed: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SdftError) as error:
        validate(changed(Config(), **VALID | settings))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss.method": "dft", "rollout.source": "offline"},
        OTHER,
        OTHER | {"teacher.context": "none", "rollout.source": "offline"},
        OTHER | {"lora.earlier": "merge"},
        {"eval.guard": "g.jsonl", "eval.every": 1, "eval.max_drop": 0.0},
        SETS | {"eval.guard": "old", "train.keep_best": "new"},
    ],
    ids=str,
)
def test_settings_that_go_together(changed: Any, settings: dict[str, Any]) -> None:
    validate(changed(Config(), **VALID | settings))


def test_a_guard_is_a_file_or_one_of_the_sets(changed: Any) -> None:
    sets = {"new": "a", "old": "b"}
    file, name = (changed(Config(), **{"eval.sets": sets, "eval.guard": guard}).eval for guard in ("g.jsonl", "old"))
    assert (file.guard_set, file.all_sets) == ("guard", sets | {"guard": "g.jsonl"})
    assert (name.guard_set, name.all_sets) == ("old", sets)
    assert (Config().eval.guard_set, Config().eval.all_sets) == ("", {})


# describe.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss.divergence": "reverse_kl"}, "reverse KL, KL(student || teacher), on the student's own samples; "),
        ({"loss.divergence": "forward_kl"}, "forward KL, KL(teacher || student)"),
        ({"loss.divergence": "jsd", "loss.beta": 0.25}, "JSD with beta = 0.25"),
        ({"teacher.kind": "ema", "teacher.ema_alpha": 0.07}, "moving average (alpha = 0.07)"),
        ({"teacher.kind": "base"}, "Teacher: the student's weights at the start"),
        ({"teacher.kind": "live"}, "Teacher: the current student"),
        ({"rollout.source": "teacher"}, "on the teacher's samples"),
        ({"rollout.source": "mixed"}, "on samples of student and teacher in turns"),
        ({"loss.mask_first": 3}, "first 3 tokens masked"),
        ({"loss.average": "sequence"}, "mean of each answer, then of the answers"),
        ({"loss.method": "sft"}, "SFT: cross-entropy of the student on the demonstrations."),
        ({"loss.method": "dft"}, "DFT: cross-entropy of the student on the demonstrations, each token weighted by the"),
        ({"rollout.source": "offline"}, "on samples that the teacher at its start gives before the first step"),
        (
            {"loss.method": "sft", "rollout.source": "offline"},
            "on answers that the model at its start, shown the demonstration (in_prompt), gives before the first step.",
        ),
        (OTHER | {"teacher.context": "none"}, "Teacher: the weights of m, which sees just the prompt."),
    ],
)
def test_describe_says_what_is_trained(changed: Any, settings: dict[str, Any], words: str) -> None:
    assert words in describe(changed(Config(), **settings))


def test_float32_products_of_bfloat16_weights_are_refused(tmp_path: Path) -> None:
    model = '[model]\nname = "m"\nweights_dtype = "bfloat16"\ncompute_dtype = "float32"\n'
    config = read(tmp_path, model + '[data]\ntrain = "d.jsonl"\n[train]\noutput = "o"\n')
    with pytest.raises(SdftError, match=r"set model\.weights_dtype = 'float32' too"):
        validate(config)
