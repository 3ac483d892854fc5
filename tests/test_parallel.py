"""Sums over ranks: nothing on one process; on two, a step is the step of one process.

The two processes are this file run as a script, over gloo.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft import parallel
from sdft.config import load_config, to_toml
from sdft.errors import SdftError

CPU = torch.device("cpu")
RANKS = 2


def test_one_process_gets_back_what_it_gave(capsys: Any) -> None:
    tensor = torch.ones(3)
    assert parallel.sum_over_ranks(tensor) is tensor
    assert parallel.whole(tensor) is tensor
    assert (parallel.world_size(), parallel.rank(), parallel.is_main()) == (1, 0, True)
    assert parallel.share([1, 2, 3]) == [1, 2, 3]
    assert parallel.sum_counts([1, 2], CPU) == [1, 2]
    assert [parallel.any_rank(flag, CPU) for flag in (True, False)] == [True, False]
    parallel.barrier()
    parallel.report("once")
    assert capsys.readouterr().out == "once\n"


# On each of two ranks.


def step_of(config: Any, folder: Path) -> dict[str, Any]:
    """One step on this rank's share of the batch, with the gradients summed over the ranks; metrics and weights."""
    import time

    import torch.distributed as dist

    from sdft.training.completions import complete
    from sdft.training.gradients import accumulate_gradients
    from sdft.training.setup import set_up
    from sdft.training.step import metrics_of, seed_step, update_weights

    run = set_up(config, folder)
    seed_step(0, 0)
    examples, completions = complete(run, parallel.share(run.data.examples[: config.train.batch_size]), 0)
    scored = accumulate_gradients(run, examples, completions)
    if parallel.world_size() > 1:  # what FSDP does in the backward pass
        for p in run.model.trainable().values():
            dist.all_reduce(p.grad)
    update = update_weights(run, 0, scored.loss)
    line = metrics_of(run, examples, completions, scored, update, time.perf_counter())
    weights = {name: p.detach() for name, p in run.model.trainable().items()}
    return {"line": {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "peak_memory")},
            "weights": weights}  # fmt: skip


def sums() -> dict[str, Any]:
    rank, given = parallel.rank(), torch.tensor([1.0, 10.0]) * (parallel.rank() + 1)
    total = parallel.sum_over_ranks(given)
    return {
        "main": parallel.is_main() == (rank == 0),
        "share": parallel.share([0, 1, 2, 3, 4]) == [[0, 2, 4], [1, 3]][rank],
        "sum": total.tolist() == [3.0, 30.0],
        "the given tensor stays": given.tolist() == [rank + 1.0, 10.0 * (rank + 1)],
        "counts": parallel.sum_counts([2**60, rank], CPU) == [2**61, 1],
        "any": [parallel.any_rank(flag, CPU) for flag in (rank == 1, False)] == [True, False],
    }


def sharded() -> dict[str, Any]:
    """Gradients and weights that are divided among the ranks."""
    from torch import nn
    from torch.distributed import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from sdft.config import OptimConfig
    from sdft.score.teacher import exchanged
    from sdft.update import optim

    mesh = init_device_mesh("cpu", (RANKS,))
    whole, gradient = torch.arange(10.0).view(5, 2), torch.full((5, 2), 3.0)
    parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    norm = optim.clip([parameter], OptimConfig(clip_norm=1.0))
    module = nn.Module()
    module.weight = parameter
    refused = ""
    try:
        with exchanged(module, {"weight": whole}):
            pass
    except SdftError as error:
        refused = str(error)
    return {
        "whole": torch.equal(parallel.whole(parameter.detach()), whole),
        "norm": torch.allclose(norm, gradient.norm()),
        "clipped": torch.allclose(parallel.whole(parameter.grad), gradient / gradient.norm(), rtol=1e-5),
        "a teacher of sharded weights is refused": "sharded parameters" in refused,
    }


def metrics_file(folder: Path) -> dict[str, Any]:
    from sdft.training.metrics import MetricsLog, read_metrics

    output = folder / f"metrics-{parallel.rank()}"
    output.mkdir()
    log = MetricsLog(output, 0, (), {})
    log.write({"step": 1})
    log.close()
    parallel.report("from the main process")
    return {"only the main process writes": bool(read_metrics(output)) == parallel.is_main()}


def main(folder: Path, rank: int) -> None:
    import torch.distributed as dist
    from ranks import leave_group

    torch.set_num_threads(1)
    where = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
    found: dict[str, Any] = {"checks": sums() | sharded() | metrics_file(folder)}
    for config in sorted(folder.glob("*.toml")):
        found[config.stem] = step_of(load_config(config), folder)
    torch.save(found, folder / f"found-{rank}.pt")
    leave_group()


# One process and two.

STEPS = {
    "sft": {"loss.method": "sft"},
    "sequence": {"loss.method": "dft", "loss.average": "sequence", "train.micro_batch_tokens": 60},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> dict[str, Any]:
    """The results of two ranks and of one process. The ranks have ended by then."""
    from sdft.config import Config, override

    folder = tmp_path_factory.mktemp("ranks")
    (folder / "skill.jsonl").write_text(
        "".join(f'{{"prompt": "say {w}", "demonstration": "{w.upper() * n}"}}\n' for n, w in enumerate("abcde", 1))
    )
    common = {
        "model.name": str(model_folder("llama")),
        "model.compute_dtype": "float32",
        "data.train": f"{folder}/skill.jsonl",
        "teacher.context": "as_turns",
        "optim.lr": 1e-2,
        "optim.warmup_steps": 0,
        "optim.clip_norm": 0.5,
        "train.output": f"{folder}/run",
        "train.steps": 4,
        "train.batch_size": 5,
    }
    configs = {name: override(Config(), common | settings) for name, settings in STEPS.items()}
    for name, config in configs.items():
        (folder / f"{name}.toml").write_text(to_toml(config))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    logs = [folder / f"{rank}.txt" for rank in range(RANKS)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, __file__, str(folder), str(rank)]
            with log.open("w") as out:
                ranks.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
        alone = {name: step_of(config, folder) for name, config in configs.items()}
        codes = [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    texts = [log.read_text() for log in logs]
    assert codes == [0] * RANKS, "\n".join(texts)
    both = [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(RANKS)]
    return {"alone": alone, "ranks": both, "texts": texts}


def test_sums_and_parts(found: dict[str, Any]) -> None:
    for rank in found["ranks"]:
        assert [name for name, right in rank["checks"].items() if not right] == []
    assert ["from the main process" in text for text in found["texts"]] == [True, False]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_two_ranks_is_the_step_of_one(name: str, found: dict[str, Any]) -> None:
    """Loss, norm, metrics and weights, though the shares have different numbers of tokens."""
    want = found["alone"][name]
    for rank in found["ranks"]:
        got = rank[name]
        for key, value in want["line"].items():
            if key == "micro_batch_tokens":
                continue
            expected = {k: pytest.approx(v, rel=1e-5) for k, v in value.items()} if isinstance(value, dict) else value
            assert got["line"][key] == (expected if isinstance(value, dict) else pytest.approx(value, rel=1e-5)), key
        for key, weight in want["weights"].items():
            torch.testing.assert_close(got["weights"][key], weight, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
