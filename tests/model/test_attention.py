"""Sequences end to end: none sees another, forwards or backwards, and models that cannot keep them apart are found."""

from typing import Any

import pytest
import torch

from sdft import device
from sdft.errors import SdftError
from sdft.model import attention
from sdft.model.language_model import backbone
from sdft.model.packing import enable_packing
from sdft.rollout.engine import Completion
from sdft.score.batch import lay_out
from sdft.training.gradients import accumulate_gradients
from sdft.training.step import train_step

CPU = torch.device("cpu")
LENGTHS = (7, 1, 90, 12)  # 90 is over the tiny Gemma's window of 64


@pytest.fixture
def packed(family: str, load_tiny: Any) -> Any:
    model = load_tiny(family)[1]
    enable_packing(model, "on")
    assert model.packed
    assert model.inner.config._attn_implementation == attention.NAME
    return model


def test_no_token_sees_another_sequence(packed: Any) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (1, sum(LENGTHS)))
    with torch.no_grad():
        before = packed.hidden(ids, LENGTHS)[0].split(LENGTHS)
        for changed in range(len(LENGTHS)):
            other = ids.clone()
            other.split(LENGTHS, dim=1)[changed].add_(1)
            after = packed.hidden(other, LENGTHS)[0].split(LENGTHS)
            same = [torch.equal(a, b) for a, b in zip(after, before, strict=True)]
            assert same == [i != changed for i in range(len(LENGTHS))]


@pytest.mark.parametrize("settings", [{}, {"lora.rank": 2}, {"model.gradient_checkpointing": True}], ids=str)
def test_packed_and_padded_agree(family: str, settings: Any, make_run: Any, nudge: Any, tmp_path: Any) -> None:
    found = []
    for packing in ("on", "off"):
        output = str(tmp_path / packing)
        run = make_run(family, **settings | {"train.packing": packing, "train.output": output, "teacher.kind": "base"})
        nudge(run.model)
        run.model.lm.eval()
        examples = run.data.examples[:5]
        torch.manual_seed(0)
        completions = [Completion(torch.randint(0, 256, (n,)).tolist(), truncated=False) for n in (3, 9, 1, 6, 20)]
        scored = accumulate_gradients(run, examples, completions)
        assert (scored.real == scored.computed) == (packing == "on")
        found.append((scored, {k: p.grad for k, p in run.model.trainable().items()}))
    (one, grads), (other, padded_grads) = found
    assert one.real == other.real < other.computed
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-7)
    largest = max(g.norm() for g in padded_grads.values())
    for name, grad in grads.items():
        assert (grad - padded_grads[name]).norm() <= 1e-4 * padded_grads[name].norm() + 1e-6 * largest, name


def test_real_tokens_are_reported(make_run: Any, tmp_path: Any) -> None:
    assert train_step(make_run(), 0, tmp_path)["real_tokens"] == 1.0
    padded = make_run(**{"train.packing": "off", "train.output": str(tmp_path / "padded")})
    assert 0.5 < train_step(padded, 0, tmp_path)["real_tokens"] <= 1.0


def test_no_mask_is_built(load_tiny: Any) -> None:
    """Of all tensors made for a packed forward, none has T x T entries."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    model = load_tiny("llama")[1]
    enable_packing(model, "on")
    lengths = (100,) * 20
    with torch.no_grad(), Largest() as mode:
        model.hidden(torch.zeros(1, 2000, dtype=torch.int64), lengths)
    assert 2000 * 32 <= mode.numel < 2000 * 2000 // 4


def test_eager_attention_is_not_packed(load_tiny: Any) -> None:
    model = load_tiny(attention="eager")[1]
    enable_packing(model, "auto")
    assert not model.packed
    with pytest.raises(SdftError, match=r"train.packing = 'on': LlamaForCausalLM cannot be packed .*eager.*set 'auto'"):
        enable_packing(model, "on")


@pytest.mark.parametrize("fault", ["leak", "positions", "error"])
def test_a_model_that_does_not_keep_sequences_apart(
    fault: str, load_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Absolute positions, so that counting on from the sequence before is felt; rotary ones only know distances.
    model = load_tiny("gpt2")[1]
    own = backbone(model.inner).forward

    def forward(**arguments: Any) -> Any:
        if "lengths" in arguments:
            if fault == "error":
                raise TypeError("unexpected keyword")
            if fault == "leak":
                arguments.pop("lengths")
                arguments.pop("attention_mask")
                arguments["attention_mask"] = torch.ones(1, 1, 17, 17, dtype=torch.bool).tril()
            else:
                arguments.pop("position_ids")
        return own(**arguments)

    monkeypatch.setattr(backbone(model.inner), "forward", forward)
    enable_packing(model, "auto")
    assert not model.packed
    assert model.inner.config._attn_implementation == "sdpa"
    with pytest.raises(SdftError, match="cannot be packed"):
        enable_packing(model, "on")
    batch = lay_out([[1, 2], [3]], [[4], [5]], model.pad_id, CPU, packed=model.packed)
    assert batch.lengths is None


def test_flash_attention_is_told_the_bounds() -> None:
    arguments = attention.packed_arguments((3, 1, 2), CPU, "flash_attention_2")
    assert arguments["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["max_length_q"] == arguments["max_length_k"] == 3
    assert "attention_mask" not in arguments


@pytest.mark.parametrize("longest", [20, 400, device.WIDEN_UP_TO + 1])
def test_short_bf16_sequences_are_differentiated_in_fp32_on_the_cpu(
    longest: int, load_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states stay bf16's; gradients come nearer to exact ones than bf16's where the sequences are short."""
    module, lengths = load_tiny()[1].inner.model.layers[0].self_attn, (5, longest)
    torch.manual_seed(0)
    own = [torch.randn(1, heads, sum(lengths), 16) for heads in (4, 2, 2)]  # q, k, v
    grad = torch.randn(1, sum(lengths), 4, 16).bfloat16()

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        qkv = [x.to(dtype, copy=True).requires_grad_() for x in own]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            out = attention.attend(module, *qkv, None, lengths, scaling=0.25)[0]
        assert out.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
        out.backward(grad.to(out.dtype))
        return [x.grad.double() for x in qkv]

    exact, got = gradients(torch.float64), gradients(torch.float32)
    monkeypatch.setattr(device, "WIDEN_UP_TO", 0)
    for ours, narrow, want in zip(got, gradients(torch.float32), exact, strict=True):
        error, theirs = (((x - want).norm() / want.norm()).item() for x in (ours, narrow))
        if longest > 400:
            assert torch.equal(ours[:, :, 5:], narrow[:, :, 5:])
        else:
            assert error < min(0.95 * theirs, 0.0045)
