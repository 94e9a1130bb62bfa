"""A trace of CPU ops as one for a GPU: for a package that is made where there is none."""

from __future__ import annotations

from typing import Any

import torch

DEVICE = "cuda:0"


def _mask_for_gpu(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Of all dimensions, with rows that begin at multiples of 16 elements."""
    mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    size = key.shape[2]
    if size % 16 == 0:
        return mask.contiguous()
    return torch.nn.functional.pad(mask, (0, 16 - size % 16))[..., :size]


def _attention(
    query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False,
    attn_mask: Any = None, scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    mask = None if attn_mask is None else _mask_for_gpu(attn_mask, query, key)
    out, logsumexp, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, dropout, is_causal, scale=scale
    )
    return out, logsumexp


def _attention_backward(
    grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any,
    dropout: float = 0.0, is_causal: bool = False, attn_mask: Any = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    mask = None if attn_mask is None else _mask_for_gpu(attn_mask, query, key)
    no_seed = torch.zeros((), dtype=torch.int64, device=query.device)  # of a dropout of 0
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad_out, query, key, value, mask, out, logsumexp, no_seed, no_seed, dropout,
        [True, True, True, False], is_causal, scale=scale,
    )[:3]  # fmt: skip


_aten = torch.ops.aten
_FOR_GPU = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}
_KERNELS = ("CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd",
            "CompositeExplicitAutogradNonFunctional")  # fmt: skip


def op_for_gpu(op: Any) -> Any:
    """What does on a GPU what `op` does on the CPU; None where nothing does."""
    if op in _FOR_GPU:
        return _FOR_GPU[op]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return op if any(has(op.name(), key) for key in _KERNELS) else None
