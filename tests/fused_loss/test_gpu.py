"""What only a GPU can show: the checks of `make gpu-proof`, each as a test."""

import time

import pytest
import torch

from bench.proof import check as checking
from bench.proof import offload, rollout, values
from bench.proof.check import Check
from bench.proof.phase import Place

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT MEASURED ON A GPU: this machine has none"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place("cuda", tiny=False, deadline=time.monotonic() + 3600, scratch=tmp_path_factory.mktemp("proof"))


@pytest.mark.parametrize("check", [*values.CHECKS, *rollout.CHECKS, *offload.CHECKS], ids=str)
def test_on_a_gpu(check: Check, place: Place) -> None:
    if why := checking.cannot(check, place):
        pytest.skip(why)
    with checking.exact_products():
        found = list(check.run(place))
    assert found
    assert [one for one in found if not one.right] == []
