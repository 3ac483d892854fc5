"""AdamW with 8-bit moments, by bitsandbytes (Dettmers et al. 2022): 2 bytes of state a weight instead of 8."""

from typing import Any

import bitsandbytes
import torch
from torch import Tensor

SLICE = 2**18  # entries; a multiple of bitsandbytes' block


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW8bit, with less memory on the CPU and paged moments that stay paged after a resume."""

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """One parameter's update; on the CPU in slices.

        bitsandbytes works on the CPU in fp32 copies of both moments and more: 0.5 GB for the embedding of a model of
        135M weights. Moments are quantized in blocks of 256, so slices of whole blocks give the same numbers, and
        faster, because they stay in the cache.
        """
        state = self.state[p]
        if p.device.type != "cpu" or state["state1"].dtype != torch.uint8:
            super().update_step(group, p, gindex, pindex)
            return
        state["step"] += 1
        assert p.grad is not None
        flat, grad = p.detach().view(-1), p.grad.reshape(-1)
        state1, state2 = state["state1"].view(-1), state["state2"].view(-1)
        for start in range(0, p.numel(), SLICE):
            part = slice(start, start + SLICE)
            blocks = slice(start // 256, (start + SLICE) // 256)
            bitsandbytes.functional.optimizer_update_8bit_blockwise(
                "adam",
                grad[part],
                flat[part],
                state1[part],
                state2[part],
                group["betas"][0],
                group["betas"][1],
                0.0,  # beta3 and alpha are not Adam's
                0.0,
                group["eps"],
                state["step"],
                group["lr"],
                state["qmap1"],
                state["qmap2"],
                state["absmax1"][blocks],
                state["absmax2"][blocks],
                group["weight_decay"],
            )

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """As bitsandbytes', which would leave paged moments on the device."""
        super().load_state_dict(state_dict, move_to_device)
        if not self.is_paged:
            return
        for p, state in self.state.items():
            for name in ("state1", "state2"):
                buffer = self.get_state_buffer(p, dtype=state[name].dtype)
                buffer.copy_(state[name])
                state[name] = buffer
