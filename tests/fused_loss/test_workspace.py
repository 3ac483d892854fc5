"""How a call divides its workspace: arithmetic, no device."""

from hypothesis import given
from hypothesis import strategies as st
from sdft_kernels.workspace import chunk_rows, default_workspace, plan_workspace

GIB, MIB = 2**30, 2**20


def test_the_default_is_a_share_of_the_device() -> None:
    assert default_workspace(80 * GIB) == 1.25 * GIB
    assert default_workspace(16 * GIB) == 256 * MIB
    assert default_workspace(8 * GIB) == 128 * MIB
    assert default_workspace(None) == 256 * MIB


@given(rows=st.integers(0, 20_000), row_bytes=st.integers(1, 10**6), budget=st.integers(1, 10**9))
def test_chunks_fill_the_budget_with_whole_tiles(rows: int, row_bytes: int, budget: int) -> None:
    chunk = chunk_rows(rows, row_bytes, budget)
    fit = max(1, budget // row_bytes)
    assert 1 <= chunk <= max(1, rows)
    assert chunk <= fit
    if chunk < rows:
        multiple = 128 if fit >= 512 else 64
        assert chunk % multiple == 0 or (fit < 64 and chunk & (chunk - 1) == 0)
        count = -(-rows // chunk)
        if fit >= 64:
            assert count == -(-rows // (fit - fit % multiple)), "no more chunks than the budget asks for"
    assert chunk_rows(rows, row_bytes, rows * row_bytes) == max(1, rows), "never more than the logits need"


def test_a_7b_head_on_an_80_gib_card() -> None:
    """Qwen2.5-7B: 152k x 3584; fp32 logits of both sides, hidden states of both sides and dX, in bytes a token."""
    vocab, hidden = 152_064, 3584
    row_bytes = 8 * vocab + 16 * hidden
    assert plan_workspace(16_384, row_bytes, default_workspace(80 * GIB)).chunk == 1024
    head = 2 * vocab * hidden  # of an fp32 head as bf16: more than half of the workspace
    tiles = plan_workspace(16_384, row_bytes, default_workspace(80 * GIB), [head])
    assert tiles.casts == (default_workspace(80 * GIB) // 8,)
    both = plan_workspace(16_384, row_bytes, default_workspace(80 * GIB), [head, head])
    assert both == (tiles.chunk, tiles.casts * 2), "tiles of both heads take turns in one buffer"
    once = plan_workspace(16_384, row_bytes, 4 * GIB, [head, head])
    assert once.casts == (head, 4 * GIB // 8)


@given(
    rows=st.integers(1, 5000),
    row_bytes=st.integers(1, 10**5),
    budget=st.integers(10**6, 10**9),
    casts=st.lists(st.integers(1, 10**9), max_size=2),
)
def test_casts_are_part_of_the_budget(rows: int, row_bytes: int, budget: int, casts: list[int]) -> None:
    plan = plan_workspace(rows, row_bytes, budget, casts)
    assert len(plan.casts) == len(casts)
    assert all(0 < took <= whole for took, whole in zip(plan.casts, casts, strict=True))
    kept = sum(took for took, whole in zip(plan.casts, casts, strict=True) if took == whole)
    tile = max((took for took, whole in zip(plan.casts, casts, strict=True) if took < whole), default=0)
    assert plan.chunk == 1 or kept + tile + plan.chunk * row_bytes <= budget


def test_heads_are_cast_once_if_that_moves_fewer_bytes() -> None:
    assert plan_workspace(1000, 1, 1000, [600, 600]) == (512, (125, 125))
    assert plan_workspace(1000, 1, 1000, [300, 300]) == (512, (300, 125))
    assert plan_workspace(5000, 1, 1000, [200, 200]) == (512, (200, 200))
    assert plan_workspace(1000, 1, 1000, [400, 900]) == (512, (125, 125))
    assert plan_workspace(1000, 1, 2000, [400, 1700]) == (1000, (400, 250))
    assert plan_workspace(10, 1, 1000, [501, 370]).casts == (501, 125), "one chunk casts the teacher's head once anyway"
    assert plan_workspace(10, 1, 1000, [501], tile=80, other=495) == (10, (80,)), "no room"
