"""The metrics of a run: numbers by hand, one JSON object a line, trackers."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft.device import peak_memory
from sdft.errors import SdftError
from sdft.loss import TokenLoss
from sdft.training import metrics
from sdft.training.metrics import (
    MetricsLog,
    Phases,
    ProgressBar,
    check_trackers,
    read_metrics,
    token_metrics,
)

CPU = torch.device("cpu")


def part(*loss: float) -> TokenLoss:
    values = torch.tensor(loss, dtype=torch.float32)
    return TokenLoss(values, values + 1, values + 2, -values, -2 * values, values > 2)


def test_token_metrics_by_hand() -> None:
    got = token_metrics([part(1, 2, 3, 4), part(5, 7)], [[0, 1, 2, 3], [6, 7]])
    assert got == {
        "token_loss": pytest.approx(22 / 6),
        "student_entropy": pytest.approx(22 / 6 + 1),
        "teacher_entropy": pytest.approx(22 / 6 + 2),
        "student_logprob": pytest.approx(-22 / 6),
        "teacher_logprob": pytest.approx(-44 / 6),
        "top1_agree": pytest.approx(4 / 6),
        "loss_by_position": {"0-0": 1.0, "1-2": 2.5, "3-6": 4.5, "7-14": 7.0},
    }


def test_token_metrics_of_a_gap_of_sft_and_of_nothing() -> None:
    assert token_metrics([TokenLoss(torch.tensor([1.0, 3.0]))], [[0, 40]]) == {
        "token_loss": 2.0, "loss_by_position": {"0-0": 1.0, "31-62": 3.0}
    }  # fmt: skip
    assert token_metrics([], []) == {}


def test_phases_add_up_by_name() -> None:
    phases = Phases(CPU)
    for _ in range(2):
        with phases("loss"):
            time.sleep(0.02)
    seconds = phases.seconds()
    assert set(seconds) == {"rollout", "score", "loss", "backward", "update"}
    assert 0.04 <= seconds["loss"] < 0.5
    assert seconds["rollout"] == seconds["score"] == seconds["backward"] == seconds["update"] == 0


def test_peak_memory_is_the_process_peak() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc here to compare with")
    kilobytes = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory(CPU) == pytest.approx(kilobytes * 1024, rel=0.02)


def test_log_appends_and_resuming_drops_what_came_after(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, (), {})
    for step in range(4):
        log.write({"step": step, "loss": step / 2})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4  # flushed, before any close
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]
    log = MetricsLog(tmp_path, 2, (), {})
    log.write({"step": 3, "loss": 9.0})
    log.close()
    assert [(x["step"], x["loss"]) for x in read_metrics(tmp_path)] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 9.0)]
    MetricsLog(tmp_path, 0, (), {}).close()
    assert read_metrics(tmp_path) == []


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, (), {})
    log.write({"step": 1, "loss": float("nan"), "seconds": {"loss": float("inf")}, "lr": 0.5})
    log.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "seconds": {"loss": None}, "lr": 0.5}


def test_trackers_get_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(metrics, "_tracker", lambda name, output, config: lambda n, step: seen.append((name, step, n)))
    log = MetricsLog(tmp_path, 0, ("wandb",), {})
    log.write({"step": 3, "loss": 0.5, "seconds": {"loss": 2}, "note": "text"})
    assert seen == [("wandb", 3, {"loss": 0.5, "seconds/loss": 2})]


def test_a_missing_tracker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(())
    with pytest.raises(
        SdftError, match=r"train\.trackers names 'wandb', which is not installed; run: pip install wandb"
    ):
        check_trackers(("wandb",))


LINE = {
    "loss": 0.12345, "tokens_per_second": 81.4, "peak_memory": 3 * 2**30,
    "seconds": {"rollout": 1.5, "score": 0.25, "loss": 0.5, "backward": 0.75, "update": 0.125},
}  # fmt: skip


def test_progress_tells_all_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(2, 10)
    bar.update(4, LINE)
    bar.say("a word")
    bar.close()
    first, second = capsys.readouterr().out.strip().splitlines()
    for words in ("4/10", "loss 0.1235", "81 tok/s", "rollout 1.50s score 0.25s loss 0.50s", "peak 3.0 GiB", "ETA"):
        assert words in first
    assert second == "a word"
