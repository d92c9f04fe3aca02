"""Tensor parallelism: the layers of a finished model, divided among the ranks of one dimension of a mesh.

As in Megatron (Narayanan et al. 2021; Korthikanti et al. 2022): a rank has some of the heads and some columns of the
wide layer, and the residual stream and its norms have a part of the rows. The ranks gather the rows before a product
and add up and scatter the products after it. All else, such as embeddings, rotary angles, attention within a head, the
last norm and the head, is computed by every rank alike.

Parameters of the layers become ``DTensor``s on the mesh: those of q, k, v and fc1 are divided by output, the weights of
out and fc2 by input, and norms and the other biases are copies. Other parameters stay plain tensors, whose gradients
are whole and the same on every rank.

Shapes: T tokens, D model width, t ranks.
"""

from __future__ import annotations

from math import gcd
from typing import Any, Final

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.models.transformer import TransformerLayer

_ROWS: Final = [Shard(0)]
_WHOLE: Final = [Replicate()]


def apply_tensor_parallel(model: Encoder, mesh: DeviceMesh) -> None:
    """Divide the layers that the model has, in place; it may be on the meta device, and a stage of a pipeline.

    ``mesh`` has one dimension. Every rank has the whole weights before and keeps its part; nothing is sent.

    Raises:
        UsageError: the layers are not transformer layers, do not divide, or have dropout.
    """
    check_tensor_parallel(model, mesh.size())
    layers = dict(model.layers.named_children())
    for layer in layers.values():
        parallelize_module(layer, mesh, _plan(), src_data_rank=None)

    def scatter(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = arguments
        if len(x) % mesh.size():
            raise UsageError(
                f"parallel.tensor={mesh.size()} does not divide the {len(x):,} tokens of a pack; set batch.pack to a "
                f"multiple of {mesh.size()}"
            )
        return (DTensor.from_local(x, mesh, _WHOLE, run_check=False).redistribute(placements=_ROWS).to_local(), *others)

    def gather(module: nn.Module, arguments: tuple[Any, ...], x: Tensor) -> Tensor:
        return DTensor.from_local(x, mesh, _ROWS, run_check=False).redistribute(placements=_WHOLE).to_local()

    if first := layers.get("0"):
        first.register_forward_pre_hook(scatter)
    if last := layers.get(str(model.config.num_hidden_layers - 1)):
        last.register_forward_hook(gather)
        # A rank has a part of the rows, whichever are wanted.
        last.chooses_rows = False  # type: ignore[assignment]


def check_tensor_parallel(model: Encoder, ranks: int) -> None:
    """Raise ``UsageError`` if the layers of a model cannot be divided among so many ranks."""
    name = f"parallel.tensor={ranks}"
    for layer in model.layers:
        if type(layer) is not TransformerLayer:
            raise UsageError(f"{name}: {model.config.family} models have layers that cannot be divided; set it to 1")
        heads, width = model.config.attention_heads[0], layer.fc1.out_features
        if heads % ranks or width % ranks:
            common = gcd(heads, width)
            fitting = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
            raise UsageError(
                f"{name} does not divide the {heads} attention heads and the {width:,} columns of fc1 of this "
                f"{model.config.family} model; it may be {fitting}"
            )
        if layer.dropout or layer.attention_dropout:
            # A rank would have to draw the numbers of all heads and rows, which no attention kernel of a GPU can do.
            raise UsageError(
                f"{name}: divided layers would not drop the same numbers as one process does; set it to 1, or set "
                "model.hidden_dropout_prob=0 and model.attention_probs_dropout_prob=0"
            )


def _plan() -> dict[str, ParallelStyle]:
    """How each part of a transformer layer is divided."""
    norm, columns, rows = _NormOfRows(), ColwiseParallel(), RowwiseParallel(output_layouts=Shard(0))
    return {
        "self_attn_layer_norm": norm,
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), columns),
        "self_attn.out_proj": rows,
        "final_layer_norm": norm,
        "fc1": columns,
        "fc2": rows,
    }


class _NormOfRows(ParallelStyle):
    """A norm of ``[T/t, D]``, whose output the ranks gather, ``[T, D]``: a copy on each rank.

    The output stays a ``DTensor``, so that the gradients of all products that read it are added up before they are
    scattered, in one operation.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters()):
            copy = DTensor.from_local(parameter.detach(), device_mesh, _WHOLE, run_check=False)
            module.register_parameter(name, nn.Parameter(copy, requires_grad=parameter.requires_grad))
        module.register_forward_pre_hook(
            lambda _, arguments: (DTensor.from_local(arguments[0], device_mesh, _ROWS, run_check=False),)
        )
        module.register_forward_hook(lambda module, arguments, output: output.redistribute(placements=_WHOLE))
        return module
