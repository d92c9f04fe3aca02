"""A kernel that follows the definition of attention, to compare other kernels with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from protea.models.attention import AttentionCall, Kernel


def run(call: AttentionCall) -> Tensor:
    """One sequence at a time, in float32 or better."""
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    outputs: list[Tensor] = []
    for (q0, q1), (k0, k1) in zip(call.cu_q.spans(), call.cu_k.spans(), strict=True):
        rows = call.q[q0:q1], call.k[k0:k1], call.v[k0:k1]
        queries, keys, values = (x.to(dtype).transpose(0, 1) for x in rows)
        scores = queries @ keys.transpose(1, 2) * call.scale
        if call.bias is not None:
            scores = scores + call.bias[:, : scores.shape[1], : scores.shape[2]]
        outputs.append((F.dropout(scores.softmax(-1), call.dropout) @ values).transpose(0, 1).to(call.q.dtype))
    return torch.cat(outputs)


REFERENCE = Kernel("reference", run, bias=True, dropout=True, gradients=True)
