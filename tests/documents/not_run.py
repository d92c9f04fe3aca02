"""Commands of the documents that tests cannot run, and commands that do not end with 0 here, each with the reason.

Every command of ``protea`` among them is still parsed by the program's own parser.
"""

from __future__ import annotations

from typing import Final

NOT_RUN: Final = {
    r"^make (demo|test|mini|wheels|lock|changelog|native|docs|notebooks|newcomer|lint|types|unit|test-\w+)\b": (
        "builds an environment or tests all; `make newcomer` and the workflows run it"
    ),
    r"^(python3? -m )?pip .*install|^uv |^conda ": "downloads packages; `make newcomer` installs them",
    r"^sbatch |\bSLURM_": "needs SLURM",
    r"^docker ": "needs Docker's service and downloads images",
    r"--devices [2-9]": "needs several GPUs",
    r"--ray ": "needs a cluster of Ray",
    r"^python3? benchmarks/": "measures for minutes",
    r"^git clone |^hf download ": "needs a network",
    r"^(\. |source )": "changes the reader's shell",
    r"^tensorboard ": "runs until it is stopped",
}
"""Patterns of lines, each with the reason."""

CODES: Final = {
    r"^protea check( |$)(?!--)": ((0, 1, 3), "the stand-ins have random weights, so they are not the published ones"),
}
"""Patterns of lines, each with exit codes that are right with the stand-ins, and the reason."""

SLOW: Final = (
    r"\bprotea (data (?!info)|pretrain (?!--list)|finetune|predict|"
    r"compare|evaluate (flip|contacts)|fit-contacts|plan|serve)"
    r"|protea (merge|export|average) |^curl |torchrun|--against|--pseudo|[|;>$]|^python3? "
)
"""Lines that take a second or more: `make test-long` runs them, `make test` only parses them."""
