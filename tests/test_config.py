"""Settings: precedence, round trip, the error for each mistake."""

import math
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft.config import (
    PRESETS,
    Config,
    LoraConfig,
    OptimConfig,
    config_keys,
    describe,
    free_on_resume,
    from_table,
    get,
    load_config,
    override,
    to_toml,
    validate,
)
from sdft.config.settings import keys
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


def test_every_setting_has_a_text() -> None:
    for key, field in keys().items():
        assert len(field.description or "") > 10, key


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


# What is declared, read from the declarations: a new setting is tested by being declared.


@dataclass(frozen=True)
class Declared:
    """A setting, or an entry of one: its type, and its bounds if it is a number."""

    kind: Any
    bounds: dict[str, float]

    @classmethod
    def of(cls, kind: Any, metadata: Iterable[Any] = ()) -> "Declared":
        found = {name: getattr(m, name) for m in metadata for name in ("ge", "gt", "le", "lt") if hasattr(m, name)}
        if get_origin(kind) is Annotated:
            (info,) = kind.__metadata__
            return cls.of(kind.__origin__, info.metadata)
        return cls(kind, found)

    @property
    def entries(self) -> "list[Declared]":
        """What a list, a pair or a table holds."""
        origin, args = get_origin(self.kind), get_args(self.kind)
        held = {tuple: args, dict: args[1:]}.get(origin, ())
        return [Declared.of(kind) for kind in held if kind is not Ellipsis]

    def good(self) -> st.SearchStrategy[Any]:
        """Any valid value."""
        origin, args = get_origin(self.kind), get_args(self.kind)
        text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
        if origin is Literal:
            return st.sampled_from(args)
        if origin is tuple:
            if args[-1] is Ellipsis:
                return st.lists(self.entries[0].good(), max_size=3).map(tuple)
            return st.tuples(*(entry.good() for entry in self.entries))
        if origin is dict:
            return st.dictionaries(text, self.entries[0].good(), max_size=2)
        low, high = self.bounds.get("ge", self.bounds.get("gt")), self.bounds.get("le", self.bounds.get("lt"))
        if self.kind is int:
            return st.integers(low, high)
        if self.kind is float:
            return st.floats(low, high, exclude_min="gt" in self.bounds, exclude_max="lt" in self.bounds)
        return {str: text, bool: st.booleans()}[self.kind]

    def bad(self) -> list[Any]:
        """Values that must be refused: of other types, out of range, not finite."""
        wrong: dict[Any, list[Any]] = {
            int: [True, 1.5, "1", None, [1]],
            float: [True, "1", None, [1.0], float("nan"), float("inf"), -float("inf")],
            str: [1, True, None, ["x"]],
            bool: [0, 1, "true", None],
            Literal: ["no such choice", 1, None, ["x"]],
            tuple: ["x", 1, None],
            dict: ["x", 1, None, ["x"]],
        }
        values = list(wrong[get_origin(self.kind) or self.kind])
        below, above = self.outside()
        values += [value for value in (below, above) if value is not None]
        if get_origin(self.kind) is tuple and get_args(self.kind)[-1] is not Ellipsis:
            values += [[0.5], [0.5] * 3]  # pairs
            values += [[0.5, value] for value in self.entries[1].bad()]
        elif self.entries:
            wrap = (lambda value: [value]) if get_origin(self.kind) is tuple else (lambda value: {"key": value})
            values += [wrap(value) for value in self.entries[0].bad()]
        return values

    def outside(self) -> tuple[Any, Any]:
        """The nearest values below and above the range of a number; None for other types."""
        if self.kind not in (int, float):
            return None, None
        b, float_ = self.bounds, self.kind is float
        below = b["gt"] if "gt" in b else math.nextafter(b["ge"], -math.inf) if float_ else b["ge"] - 1
        above = b["lt"] if "lt" in b else math.nextafter(b["le"], math.inf) if float_ else b["le"] + 1
        return below, above

    def edges(self) -> list[Any]:
        """The smallest and the largest number of the range."""
        if self.kind not in (int, float):
            return []
        b, float_ = self.bounds, self.kind is float
        low = b["ge"] if "ge" in b else math.nextafter(b["gt"], math.inf) if float_ else b["gt"] + 1
        high = b["le"] if "le" in b else math.nextafter(b["lt"], -math.inf) if float_ else b["lt"] - 1
        return [low, high]


DECLARED = {key: Declared.of(field.annotation, field.metadata) for key, field in keys().items()}


def configs() -> st.SearchStrategy[Config]:
    """Any config whose settings are valid one by one."""
    return st.fixed_dictionaries({key: declared.good() for key, declared in DECLARED.items()}).map(
        lambda settings: override(Config(), settings)
    )


def numbers() -> list[tuple[str, Declared]]:
    found = [(key, d) for key, declared in DECLARED.items() for d in (declared, *declared.entries)]
    return [(key, d) for key, d in found if d.kind in (int, float)]


@pytest.mark.parametrize(("key", "number"), numbers(), ids=lambda v: v if isinstance(v, str) else "")
def test_every_number_has_a_range(key: str, number: Declared) -> None:
    assert {name[0] for name in number.bounds} == {"g", "l"}


@pytest.mark.parametrize("key", DECLARED)
def test_a_bad_value_is_refused_by_name(key: str) -> None:
    """A wrong type, below the range, above the range, NaN or infinite: in a file and in Python."""
    section, _, name = key.rpartition(".")
    for value in DECLARED[key].bad():
        with pytest.raises(SdftError) as error:
            override(Config(), {key: value})
        assert re.match(rf"{key}(\.key)? = .* (must|is not one of) ", str(error.value)), value
        with pytest.raises(SdftError) as error:
            from_table({section: {name: value}} if section else {name: value}, "config c.toml")
        assert str(error.value).startswith(f"config c.toml: {key}"), value


@pytest.mark.parametrize("key", [key for key in DECLARED if DECLARED[key].edges()])
def test_the_edges_of_a_range_are_valid(key: str) -> None:
    for value in DECLARED[key].edges():
        assert get(override(Config(), {key: value}), key) == value


@settings(max_examples=30, deadline=None)
@given(config=configs())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "round.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config
    assert repr(load_config(path)) == repr(config)  # the types too: 1 is not 1.0


def test_an_options_text_and_range_are_in_its_error() -> None:
    with pytest.raises(SdftError) as error:
        OptimConfig(clip_norm=-1.0)
    assert str(error.value) == (
        "optim.clip_norm = -1.0 must be at least 0 and at most 1000000000 (Largest gradient norm; 0 does not clip)"
    )


def test_a_copy_is_checked() -> None:
    with pytest.raises(SdftError, match=r"optim\.lr = 2 must be above 0 and at most 1"):
        replace(OptimConfig(), lr=2)
    with pytest.raises(SdftError, match=r"unknown key 'optim\.learning_rate'; did you mean 'optim\.lr'\?"):
        OptimConfig(learning_rate=1)  # type: ignore[call-arg]
    with pytest.raises(SdftError, match=r"unknown key 'optm'; did you mean 'optim'\?"):
        override(Config(), {"optm.lr": 1.0})


def test_a_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().lora.rank = 3  # type: ignore[misc]
    assert replace(LoraConfig(), rank=3) == LoraConfig(rank=3) != LoraConfig()
    assert hash(LoraConfig(rank=3)) == hash(LoraConfig(rank=3))


def test_what_may_change_at_a_resume() -> None:
    assert {"train.resume", "train.output", "rollout.batch_size"} < free_on_resume() < set(config_keys())
    assert not {"optim.lr", "train.seed", "train.steps", "model.name", "data.train"} & free_on_resume()


def test_integers_become_floats(tmp_path: Path) -> None:
    lr = read(tmp_path, "[optim]\nlr = 1\n").optim.lr
    assert lr == 1.0
    assert isinstance(lr, float)


# Mistakes.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optim]\nzzz = 1\n", "unknown key 'optim.zzz'; valid here: optim.name, optim.offload"),
        ("[optim]\nwarmup_step = 1\n", "unknown key 'optim.warmup_step'; did you mean 'optim.warmup_steps'?"),
        ("[optimm]\nlr = 1\n", "unknown key 'optimm'; did you mean 'optim'?"),
        ("[train]\nlr = 1\n", "unknown key 'train.lr'; did you mean 'optim.lr'?"),
        ("lr = 1\n", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("[train]\nlearning_rate = 1\n", "unknown key 'train.learning_rate'; did you mean 'optim.lr'?"),
        ("[train]\nnum_train_epochs = 1\n", "did you mean 'train.epochs'?"),
        ("[model]\nlora_rank = 1\n", "unknown key 'model.lora_rank'; did you mean 'lora.rank'?"),
        ("[loss]\nema_alpa = 1\n", "unknown key 'loss.ema_alpa'; did you mean 'teacher.ema_alpha'?"),
        ("[optim]\nself = 1\n", "unknown key 'optim.self'"),
        ("optim = 3\n", "optim must be a table, [optim], or OptimConfig(...) in Python, not 3"),
        ("[optim]\nlr = 'x'\n", "optim.lr = 'x' must be a number"),
        ("[optim]\nlr = true\n", "optim.lr = True must be a number"),
        ("[optim]\nlr = nan\n", "optim.lr = nan must be a finite number"),
        ("[train]\nsteps = 1.5\n", "train.steps = 1.5 must be a whole number"),
        ("[train]\nresume = 1\n", "train.resume = 1 must be true or false"),
        ("[model]\nname = 3\n", "model.name = 3 must be text"),
        ("[teacher]\nkind = 'emma'\n", "teacher.kind = 'emma' is not one of 'ema', 'base', 'live'; did you mean 'ema'"),
        ("[train]\ntrackers = ['x']\n", "train.trackers = 'x' is not one of 'tensorboard', 'wandb'"),
        ("[lora]\ntargets = 'q_proj'\n", "lora.targets = 'q_proj' must be a list"),
        ("[optim]\nbetas = [0.9]\n", "optim.betas = [0.9] must have 2 entries"),
        ("[optim]\nbetas = [0.9, 'x']\n", "optim.betas = 'x' must be a number"),
        ("[optim]\nbetas = [0.9, 1.0]\n", "optim.betas = 1.0 must be at least 0 and below 1"),
        ("[rollout]\ntop_p = 0\n", "rollout.top_p = 0 must be above 0 and at most 1 (Nucleus sampling: keep the most"),
        ("[eval]\nsets = 'x'\n", "eval.sets = 'x' must be a table"),
        ("[eval.sets]\nnew = 3\n", "eval.sets.new = 3 must be text"),
        ("preset = 'paper'\n", "preset = 'paper' is not one of 'paper_as_written', 'paper_as_run'"),
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
    with pytest.raises(SdftError, match="not UTF-8"):
        load_config(tmp_path / "latin.toml")


VALID = {"model.name": "m", "data.train": "d.jsonl", "train.output": "o"}


def test_a_minimal_config_is_valid() -> None:
    validate(override(Config(), VALID))


@pytest.mark.parametrize("key", VALID)
def test_a_required_setting_is_named(key: str) -> None:
    with pytest.raises(SdftError, match=f"^{key} = '' is missing; give "):
        validate(override(Config(), {name: value for name, value in VALID.items() if name != key}))


OTHER = {"teacher.model": "m", "teacher.kind": "base"}
SETS: dict[str, Any] = {"eval.sets": {"new": "a", "old": "b"}, "eval.every": 1}


@pytest.mark.parametrize("best", ["new", "old", "mean", ""])
def test_the_best_of_a_set_or_of_all(best: str) -> None:
    validate(override(Config(), VALID | SETS | {"train.keep_best": best}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval.every": 1}, "eval.sets = {} is empty though eval.every is set"),
        ({"train.resume_step": 3}, "train.resume_step = 3 has no effect alone; set train.resume = true"),
        ({"train.keep_best": "new"}, "train.keep_best = 'new' is none of eval.sets: there are none"),
        (SETS | {"train.keep_best": "nwe"}, "train.keep_best = 'nwe' is none of eval.sets: new, old"),
        (
            SETS | {"train.keep_best": "new", "eval.every": 0},
            "train.keep_best = 'new' needs evaluations; set eval.every",
        ),
        (
            SETS | {"train.keep_best": "mean", "eval.sets": {"mean": "a"}},
            "is the mean, and the name of a set; rename the set",
        ),
        ({"teacher.context": "template", "teacher.template": "{request}"}, "has no {demonstration}"),
        ({"teacher.context": "template", "teacher.template": "{demonstration}"}, "has no {request}"),
        (
            {"teacher.context": "template"},
            "teacher.context = 'template' needs teacher.template with {request} and {demonstration} in it",
        ),
        ({"teacher.request": "no place for it"}, "teacher.request = 'no place for it' has no {request}"),
        ({"teacher.template": "{request} {demonstration}"}, "has no effect: teacher.context is not 'template'"),
        (
            {"optim.offload": True, "optim.name": "adamw_8bit"},
            "optim.name = 'adamw_8bit' does not go with optim.offload",
        ),
        (
            {"teacher.offload": True, "teacher.kind": "base"},
            "teacher.kind = 'base' has no moving average; drop teacher.offload",
        ),
        ({"lora.dora": True}, "lora.dora = True has no effect without an adapter; set lora.rank above 0"),
        ({"lora.rslora": True}, "lora.rslora = True has no effect without an adapter"),
        ({"lora.modules_to_save": ("lm_head",)}, "lora.modules_to_save = ('lm_head',) has no effect without"),
        ({"lora.earlier": "stack"}, "lora.earlier = 'stack' needs a new adapter; set lora.rank above 0"),
        ({"lora.earlier": "stack", "lora.rank": 2, "lora.dora": True}, "lora.dora = True does not add to another"),
        (
            {"lora.rank": 2, "model.name": "a.gguf"},
            "is a GGUF file, which cannot be the base of a LoRA adapter; run `sdft",
        ),
        ({"model.quantize": "4bit"}, "model.quantize = '4bit' freezes the weights; set lora.rank above 0"),
        ({"model.quantize": "4bit", "lora.rank": 2, "lora.earlier": "merge"}, "would round the adapter into 4-bit"),
        ({"loss.method": "sft", "rollout.source": "mixed"}, "rollout.source = 'mixed' has no effect with loss.method"),
        (
            {"loss.method": "dft", "rollout.source": "teacher"},
            "set 'offline' to train on the completions of the teacher",
        ),
        ({"teacher.context": "none"}, "makes the teacher the student itself, which has nothing to teach"),
        ({"teacher.model": "m", "loss.method": "dft"}, "teacher.model = 'm' has no effect with loss.method = 'dft'"),
        ({"teacher.model": "m"}, "teacher.model = 'm' goes with teacher.kind = 'base', not 'ema'"),
        (OTHER | {"lora.rank": 2}, "teacher.model = 'm' needs full fine-tuning, and lora.rank = 2"),
        (OTHER | {"lora.earlier": "continue"}, "needs full fine-tuning, and lora.earlier = 'continue'"),
        ({"eval.guard": "g.jsonl"}, "eval.guard = 'g.jsonl' needs evaluations; set eval.every"),
        ({"eval.max_drop": 5.0}, "eval.max_drop = 5.0 has no effect without eval.guard"),
        ({"eval.guard": "g", "eval.every": 1, "eval.sets": {"guard": "x"}}, "eval.sets has another set of this name"),
        ({"eval.guard": "g", "eval.every": 1, "train.keep_best": "guard"}, "is none of eval.sets"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SdftError) as error:
        validate(override(Config(), VALID | changes))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "changes",
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
def test_settings_that_go_together(changes: dict[str, Any]) -> None:
    validate(override(Config(), VALID | changes))


def test_a_guard_is_a_file_or_one_of_the_sets() -> None:
    sets = {"new": "a", "old": "b"}
    file, name = (override(Config(), {"eval.sets": sets, "eval.guard": guard}).eval for guard in ("g.jsonl", "old"))
    assert (file.guard_set, file.all_sets) == ("guard", sets | {"guard": "g.jsonl"})
    assert (name.guard_set, name.all_sets) == ("old", sets)
    assert (Config().eval.guard_set, Config().eval.all_sets) == ("", {})


# describe.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss.divergence": "reverse_kl"}, "reverse KL, KL(student || teacher), on the student's own samples; "),
        ({"loss.divergence": "forward_kl"}, "forward KL, KL(teacher || student)"),
        ({"loss.divergence": "jsd", "loss.beta": 0.25}, "JSD with beta = 0.25"),
        ({"teacher.kind": "ema", "teacher.ema_alpha": 0.07}, "moving average (alpha = 0.07)"),
        ({"teacher.kind": "base"}, "Teacher: the student's weights at the start"),
        ({"teacher.kind": "live"}, "Teacher: the current student"),
        ({"rollout.source": "teacher"}, "on the teacher's samples"),
        ({"rollout.source": "mixed"}, "on samples of the student and of the teacher, in turns"),
        ({"loss.mask_first": 3}, "first 3 tokens masked"),
        ({"loss.average": "sequence"}, "mean of each completion, then of the completions"),
        ({"loss.method": "sft"}, "SFT: cross-entropy of the student on the demonstrations."),
        ({"loss.method": "dft"}, "DFT: cross-entropy of the student on the demonstrations, each token weighted by the"),
        ({"rollout.source": "offline"}, "on samples that the teacher draws before the first step"),
        (
            {"loss.method": "sft", "rollout.source": "offline"},
            "on completions that the model, shown the demonstration (in_prompt), samples before the first step.",
        ),
        (OTHER | {"teacher.context": "none"}, "Teacher: the weights of m, which sees just the prompt."),
    ],
)
def test_describe_says_what_is_trained(changes: dict[str, Any], words: str) -> None:
    assert words in describe(override(Config(), changes))


def test_float32_products_of_bfloat16_weights_are_refused(tmp_path: Path) -> None:
    model = '[model]\nname = "m"\nweights_dtype = "bfloat16"\ncompute_dtype = "float32"\n'
    config = read(tmp_path, model + '[data]\ntrain = "d.jsonl"\n[train]\noutput = "o"\n')
    with pytest.raises(SdftError, match=r"set model\.weights_dtype = 'float32' too"):
        validate(config)
