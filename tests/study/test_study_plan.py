"""`sdft study --plan`: the operations and the memory of the steps that the study would run."""

from typing import Any

from sdft.config import override
from sdft.model import flops
from sdft.planning.machine import GIB, this_machine
from sdft.planning.plan import predict
from sdft.planning.work import shape_of, tokenized, works_of
from sdft.study.plan import plan_study
from sdft.study.spec import cells, load_study, stage_configs


def test_the_plan_reads_the_data(make_study: Any) -> None:
    """Runs that differ in learning rate and seed only are one line."""
    methods = {
        "sdft": {"teacher": {"kind": "base"}},
        "off": {"rollout": {"source": "offline"}, "loss": {"method": "sft"}},
    }
    found = load_study(make_study(methods=methods))
    machine = this_machine(found.config, GIB)
    planned = plan_study(found, machine)
    assert [one.name for one in planned] == ["sdft, colours", "sdft, sizes", "off, colours", "off, sizes"]
    assert [(one.runs, one.steps) for one in planned] == [(4, 2)] * 4
    for one, cell in zip(planned[::2], cells(found)[::2], strict=False):
        config = override(stage_configs(found, cell, 0, "")[0], {"model.name": found.config.model.name})
        shape, works = shape_of(config), list(works_of(config, tokenized(config)))
        steps = sum(flops.step_flops(shape, config, work).total for work in works)
        asked = works[0].offline  # six records
        drawn = flops.completion_flops(shape, asked, [4] * 6) if asked else 0
        assert one.flops == steps + drawn
        assert (len(works), len(asked)) == (2, 0 if cell.method.name == "sdft" else 6)
        assert one.peak == max(predict(shape, config, work, machine).peak for work in works)
