"""The model that a recipe trains, and the weights that it begins with."""

from __future__ import annotations

import torch

from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.models.encoder import Encoder
from protea.models.registry import build, initial_value
from protea.train.recipe import Recipe


def architecture(recipe: Recipe) -> Encoder:
    """The model that a recipe trains, on the meta device; only parameters that are trained require gradients.

    Raises:
        UsageError: a name is unknown.
        CheckpointError: ``init`` is damaged, or of no known format.
        CapabilityError: ``init`` has no language-model head.
    """
    if recipe.init is None:
        model = build(recipe.config)
        # Contacts are fitted to structures later; random weights would pass for a head.
        model.contact_head = None
    else:
        with open_checkpoint(locate(recipe.init)) as found:
            model = found.model
        model.require("logits")
    return _to_train(model)


def initialise(recipe: Recipe, device: torch.device) -> Encoder:
    """The same model with the weights that training begins with, float32.

    Raises:
        CheckpointError: ``init`` is damaged, or of no known format.
    """
    if recipe.init is None:
        model = architecture(recipe)
        names = [name for name, _ in model.named_parameters()]
        state = {name: initial_value(model, name, recipe.run.seed).to(device) for name in names}
        state |= {name: buffer.to(device) for name, buffer in model.stored_buffers.items()}
        model.load_state_dict(state, assign=True)
        return model
    with open_checkpoint(locate(recipe.init)) as found:
        model = found.load(dtype=torch.float32, device=device)
        for parameter in model.parameters():
            # Weights of this type are still those of the file.
            parameter.data = parameter.data.clone()
    return _to_train(model)


def _to_train(model: Encoder) -> Encoder:
    """All parameters are trained but the contact head's, which is fitted to structures and has no part in the loss."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("contact_head."))
    return model
