"""Everything that a study measures of one model: accuracies, lm_eval's metrics, pass@k, distance from the base."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdft import files
from sdft.config import Config, EvalConfig, RolloutConfig, override
from sdft.data.formats import load_records
from sdft.data.prompts import set_chat_template
from sdft.data.records import Example
from sdft.evaluation import accuracy, drift, harness, pass_at_k
from sdft.model import loading, packing
from sdft.model.language_model import LanguageModel
from sdft.rollout.engine import Engine
from sdft.rollout.sampling import ModelEngine
from sdft.study.spec import Harness, Study, Task


@dataclass(frozen=True)
class Loaded:
    """A model in memory, and the settings by which it is evaluated."""

    model: LanguageModel
    tokenizer: Any
    eval: EvalConfig
    system: str  # data.system

    @property
    def engine(self) -> Engine:
        """What generates by the model."""
        return ModelEngine(self.model)

    def prompts(self, records: Sequence[Example]) -> list[list[int]]:
        """Token ids of the records' prompts, without demonstrations."""
        return accuracy.student_prompts(self.tokenizer, records, self.system)

    def sampling(self, temperature: float) -> RolloutConfig:
        return RolloutConfig(
            temperature=temperature, max_new_tokens=self.eval.max_new_tokens, batch_size=self.eval.batch_size
        )


def load(config: Config, name: str) -> Loaded:
    """The model `name`, loaded as a run with this config loads its model."""
    model_config = override(config, {"model.name": name}).model
    tokenizer, stop_ids = loading.load_tokenizer(model_config)
    set_chat_template(tokenizer, config.data.chat_template)
    model = loading.load(model_config, tokenizer, stop_ids)
    packing.enable_packing(model, config.train.packing)
    return Loaded(model, tokenizer, config.eval, config.data.system)


def on_all_sets(loaded: Loaded, sets: dict[str, str], wanted: Harness, answers: Path) -> dict[str, float]:
    """Greedy accuracy on every evaluation set, by name, and the chosen metric of every task of lm_eval.

    Writes every completion to answers/SET.jsonl, and all of lm_eval's metrics to answers/harness.json.
    """
    answers.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, path in sets.items():
        records, settings = load_records(path), loaded.eval
        result = accuracy.evaluate(
            loaded.engine, loaded.tokenizer, records, loaded.prompts(records), settings.max_new_tokens,
            settings.batch_size,
        )  # fmt: skip
        files.write_text(answers / f"{name}.jsonl", "".join(json.dumps(asdict(a)) + "\n" for a in result.answers))
        found[name] = result.accuracy
    found |= on_harness(loaded, wanted, answers / "harness.json")
    print("  ".join(f"{name} {value:.1%}" for name, value in found.items()), flush=True)
    return found


def on_harness(loaded: Loaded, wanted: Harness, path: Path) -> dict[str, float]:
    """The chosen metric of every task of lm_eval; writes all metrics to `path`. Raises SdftError for another metric."""
    if not wanted.tasks:
        return {}
    found = harness.run(
        loaded.model,
        loaded.tokenizer,
        list(wanted.tasks),
        limit=wanted.limit,
        include_path=wanted.include_path,
        num_fewshot=wanted.fewshot,
        chat=wanted.chat,
        allow_code=wanted.allow_code,
        batch_size=loaded.eval.batch_size,
    )
    scores = {task: {name: asdict(score) for name, score in of.items()} for task, of in found.items()}
    files.write_text(path, json.dumps(scores, indent=1) + "\n")
    return {task: harness.pick(found, task, metric) for task, metric in wanted.tasks.items()}


def distance_from_base(loaded: Loaded, base: LanguageModel, study: Study, task: Task) -> dict[str, dict[str, float]]:
    """`evaluation.drift` of the model along its own greedy completions, by kind of prompt.

    "new": prompts of the task's accuracy set. "prior": prompts of `study.drift_on`, or else of the prior skills. Of
    each kind, `study.drift` prompts are taken at even distances.
    """
    kinds = {
        "new": [study.sets[study.accuracy_set(task)]],
        "prior": [study.drift_on] if study.drift_on else list(study.prior.values()),
    }
    found = {}
    for kind, paths in kinds.items():
        records = [record for path in paths for record in load_records(path)]
        if records:
            count = min(study.drift, len(records))
            picked = [records[i * len(records) // count] for i in range(count)]
            found[kind] = drift.drift(
                loaded.model, base, loaded.prompts(picked), loaded.sampling(0.0), engine=loaded.engine
            ).summary()
    print("  ".join(f"KL to the base, {kind}: {of['kl_to_base']:.3f}" for kind, of in found.items()), flush=True)
    return found


def pass_at(loaded: Loaded, study: Study) -> dict[str, dict[str, float]]:
    """{set: {k: pass@k}} of every task's accuracy set, from `study.samples` completions of each prompt at
    temperature 1; empty if `study.samples` is 0."""
    if not study.samples:
        return {}
    found = {}
    for name in study.accuracy_sets:
        records = load_records(study.sets[name])
        drawn = pass_at_k.sample_answers(
            loaded.engine, loaded.tokenizer, records, loaded.prompts(records), study.samples, loaded.sampling(1.0)
        )
        found[name] = {str(k): drawn.pass_at(k) for k in drawn.powers()}
    largest = {name: list(of.items())[-1] for name, of in found.items()}
    print("  ".join(f"{name} pass@{k} {value:.1%}" for name, (k, value) in largest.items()), flush=True)
    return found
