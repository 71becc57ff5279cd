"""torch.ops.mla_stages.decode, with which torch.compile knows shapes and types without decoding.

The package may have another name: the Hub's `kernels` gives each build its own, so that several fit into a process.
"""
from typing import Tuple

import torch

from . import decode as decode_now


@torch.library.custom_op(f"{__package__}::decode", mutates_args=())
def decode(q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, seqlens_k: torch.Tensor, scale: float,
           causal: bool, stage: str, cache_format: str, cache_scale: float,
           fixed_split_tokens: int) -> Tuple[torch.Tensor, torch.Tensor]:
    out, lse = decode_now(q, kv_cache, block_table, seqlens_k, scale=scale, causal=causal, stage=stage,
                          cache_format=cache_format, cache_scale=cache_scale, fixed_split_tokens=fixed_split_tokens)
    return out, lse


@decode.register_fake
def _(q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, seqlens_k: torch.Tensor, scale: float,
      causal: bool, stage: str, cache_format: str, cache_scale: float,
      fixed_split_tokens: int) -> Tuple[torch.Tensor, torch.Tensor]:
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(batch, seqlen_q, heads, 512), q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
