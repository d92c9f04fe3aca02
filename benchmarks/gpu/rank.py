"""One process of a run of ``protea pretrain`` with FSDP2, which a run of one process otherwise does without.

``training.py --processes N`` starts it in the environment that ``torchrun`` makes: RANK, WORLD_SIZE and so on.

Usage: python benchmarks/gpu/rank.py RECIPE RUN
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

from torch.distributed.rendezvous import rendezvous

from protea.train.loop import pretrain
from protea.train.metrics import TrainingProgress
from protea.train.recipe import read_recipe
from protea.train.world import Ranks

SECONDS = 300.0


def main() -> None:
    recipe, run = sys.argv[1:]
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=SECONDS)))
    world = Ranks(store, rank, size, SECONDS)
    with world.together():
        pretrain(read_recipe(recipe), Path(run), TrainingProgress(), world=world)


if __name__ == "__main__":
    main()
