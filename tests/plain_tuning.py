"""Fine-tuning as users of transformers and peft write it, to compare Protea with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import EsmModel
from transformers.utils import logging

import protea
from protea.finetune.adapters import Adapter, insert
from protea.finetune.examples import EncodedExamples
from protea.finetune.heads import Head, HeadConfig
from protea.finetune.tasks import MISSING, Ints
from protea.finetune.tuning import TuneSettings
from protea.train.optim import parameters_to_train

logging.set_verbosity_error()
logging.disable_progress_bar()


class PlainLoop:
    """A predictor as a plain loop over padded batches has it: ``EsmModel``, peft, and a linear layer on scaled inputs.

    Adapters and head begin with the values that Protea begins with at seed 0.
    """

    def __init__(
        self,
        folder: Path,
        data: EncodedExamples,
        adapter: Path,
        settings: TuneSettings,
        config: HeadConfig,
        attention: str = "eager",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.prepared, self.labelled, self.config, self.dtype = data, data.labelled, config, dtype
        self.encoder: Any = EsmModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation=attention)
        self.esm = self.encoder
        if settings.method == "lora":
            ours = protea.load(folder, device="cpu", trainable=True).module
            config_of_peft = insert(ours, rank=settings.rank, alpha=settings.alpha, dora=settings.dora, seed=0)
            Adapter.of(ours, parameters_to_train(ours), config_of_peft).write(adapter, str(folder))
            self.encoder = PeftModel.from_pretrained(self.encoder, adapter, is_trainable=True)
            self.esm = self.encoder.base_model.model
        self.encoder.eval()
        torch.manual_seed(0)
        like = Head(config)
        self.weight, self.bias = like.body.weight, like.body.bias
        self.scales: tuple[Tensor, Tensor] | None = None

    def hidden(self, places: Ints) -> Tensor:
        """Of residues, or means of them: padded, with an attention mask."""
        ids = [self.prepared.sequences[self.prepared.which[place, 0]].ids for place in places]
        longest = max(map(len, ids)) + 2
        tokens, mask = torch.ones(len(ids), longest, dtype=torch.long), torch.zeros(len(ids), longest, dtype=torch.long)
        for row, each in enumerate(ids):
            tokens[row, : len(each) + 2] = torch.tensor([0, *each.tolist(), 2])
            mask[row, : len(each) + 2] = 1
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            x = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        rows = [x[row, 1 : len(each) + 1] for row, each in enumerate(ids)]
        if self.labelled.task.unit == "residue":
            return torch.cat(rows)
        return torch.stack([each.mean(0) for each in rows])

    def scale(self, places: Ints) -> None:
        """Centre and spread of the hidden states of the untrained encoder."""
        with torch.no_grad():
            x = self.hidden(places).double()
        self.scales = x.mean(0).float(), x.std(0, correction=0).float()

    def loss(self, places: Ints) -> Tensor:
        """The mean over labelled rows."""
        assert self.scales is not None
        outputs = F.linear((self.hidden(places) - self.scales[0]) / self.scales[1], self.weight, self.bias)
        targets = torch.from_numpy(np.concatenate([self.labelled.targets[place] for place in places]))
        if self.labelled.task.kind == "class":
            return F.cross_entropy(outputs, targets, ignore_index=MISSING)
        known = self.labelled.part("train").all_targets().values
        scaled = (targets - np.nanmean(known)) / np.nanstd(known)
        return F.mse_loss(outputs[~targets.isnan(), 0], scaled[~targets.isnan()].float())

    def parameters(self) -> dict[str, Any]:
        """What is trained."""
        named = {name: value for name, value in self.encoder.named_parameters() if value.requires_grad}
        # transformers has heads that no hidden state depends on
        named = {name: value for name, value in named.items() if "contact_head" not in name}
        return named | {"head.weight": self.weight, "head.bias": self.bias}

    def train(
        self, settings: TuneSettings, groups: Sequence[Ints], *, fused: bool = False, done: Callable[[], None] = int
    ) -> list[float]:
        """One update for each group of examples; returns the losses."""
        parameters, head_rate = self.parameters(), settings.head_lr or 1e-3
        kinds = [
            {
                "params": [value],
                "weight_decay": settings.weight_decay if value.ndim > 1 else 0.0,
                "share": head_rate / settings.rate if name.startswith("head.") else self.share(name, settings),
            }
            for name, value in parameters.items()
        ]
        optimizer = torch.optim.AdamW(kinds, fused=fused)
        losses = []
        warmup = round(settings.warmup * len(groups))
        for step, examples in enumerate(groups, 1):
            rate = step / warmup if step <= warmup else (len(groups) + 1 - step) / (len(groups) + 1 - warmup)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * rate * group["share"]
            optimizer.zero_grad()
            loss = self.loss(examples)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
            optimizer.step()
            losses.append(loss.item())
            done()
        return losses

    def share(self, name: str, settings: TuneSettings) -> float:
        """Of the highest learning rate."""
        layers = self.esm.config.num_hidden_layers
        if ".layer." in name:
            return settings.layer_decay ** (layers - 1 - int(name.split(".layer.")[1].split(".", maxsplit=1)[0]))
        return 1.0 if "emb_layer_norm_after" in name else settings.layer_decay**layers
