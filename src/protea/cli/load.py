"""A model for the commands that compute with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from protea.cli.terminal import tell

if TYPE_CHECKING:
    from pathlib import Path

    from protea.alphabet import Alphabet
    from protea.language_model import LanguageModel
    from protea.models.encoder import Encoder
    from protea.score.effects import Protein


def ensemble(models: Sequence[str]) -> dict[str, Encoder]:
    """Models without their weights, so that whatever is wrong with one is found before any computes.

    Raises:
        UsageError: one is named twice.
        CapabilityError: one has no language-model head.
        UnknownModelError: there is none of that name.
        CheckpointError: one is damaged.
    """
    from protea.checkpoints.formats import open_checkpoint
    from protea.checkpoints.hub import locate
    from protea.errors import UsageError

    found: dict[str, Encoder] = {}
    places: set[Path] = set()
    for name in models:
        path = locate(name)
        if path.resolve() in places:
            raise UsageError(f"-m {name}: named twice")
        places.add(path.resolve())
        with open_checkpoint(path) as checkpoint:
            checkpoint.model.require("logits")
            found[name] = checkpoint.model
    return found


def common_alphabet(models: Mapping[str, Encoder]) -> Alphabet:
    """The alphabet that all models of an ensemble can read.

    Raises:
        UsageError: none of their alphabets is part of the others.
    """
    from protea.errors import UsageError

    least = min((model.alphabet for model in models.values()), key=lambda alphabet: len(alphabet.residues))
    for name, model in models.items():
        if strange := sorted(set(least.residues) - set(model.alphabet.residues)):
            raise UsageError(f"-m {name}: its alphabet lacks {', '.join(strange)}, which others have; score it apart")
    return least


def check_lengths(models: Mapping[str, Encoder], proteins: Sequence[Protein], long: str) -> None:
    """See that every model of an ensemble takes the proteins, those that insertions make longer too.

    Raises:
        SequenceTooLongError: one does not.
    """
    from protea.score.expected import seen_at_once

    for protein in proteins:
        changed = (one.apply(protein.sequence) for one in protein.variants if not one.is_substitution)
        longest = max(map(len, (protein.sequence, *changed)))
        for model in models.values():
            seen_at_once(model, protein.name, longest + 2, long)


def load_to_compute(model: str, *, device: str, dtype: str, fast: bool) -> LanguageModel:
    """A model made ready to compute as fast as its numbers allow, and never again to be trained or saved.

    Args:
        model: as users name it.
        device: likewise.
        dtype: likewise.
        fast: bfloat16 where the hardware multiplies it natively, and a note where it does not.
    """
    from protea.device import native_bfloat16, resolve_device
    from protea.errors import UsageError
    from protea.language_model import load
    from protea.models.inference import for_inference

    if fast and dtype != "float32":
        raise UsageError(f"--fast chooses the type itself; leave out --dtype {dtype}")
    if fast and native_bfloat16(resolve_device(device)):
        dtype = "bfloat16"
    elif fast:
        tell("--fast: this hardware has no native bfloat16; computing in float32")
    loaded = load(model, device=device, dtype=dtype)
    for_inference(loaded.module)
    return loaded


def say_what_fast_gains(model: LanguageModel, accuracy: str) -> None:
    """After a float32 run on hardware that multiplies bfloat16: what ``--fast`` would be.

    Args:
        model: that computed.
        accuracy: of the other numbers, as measured.
    """
    from protea.device import native_bfloat16

    if model.dtype.itemsize == 4 and native_bfloat16(model.device):
        measured = " (1.3 to 2 times on the CPU it was measured on)" if model.device.type == "cpu" else ""
        tell(f"this hardware multiplies bfloat16 natively: --fast is faster{measured}, {accuracy}")


def circumstances(model: LanguageModel) -> dict[str, Any]:
    """What a model's numbers depend on, for what lies beside an output."""
    import torch

    import protea

    return {
        "version": protea.__version__,
        "torch": str(torch.__version__),
        "files": model.weights_sha256(),
        "computed_in": str(model.dtype).removeprefix("torch."),
        "computed_on": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "threads": torch.get_num_threads(),
    }
