"""Fine-tune a stored model that has lost experts towards the one that it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mtmoe.checkpoint import StoredModel
from mtmoe.errors import DataError
from mtmoe.inference import Translator
from mtmoe.inference.weight_names import stored_tensors
from mtmoe.training.recovery import RecoveryOptions, recover, training_batches


def recover_stored(
    smaller: StoredModel,
    parent: StoredModel,
    data: Path,
    directions: Sequence[str],
    options: RecoveryOptions,
    *,
    max_tokens: int = 2048,
    seed: int = 1,
    device: str = "cpu",
    progress: Callable[[int, float], object] | None = None,
) -> StoredModel:
    """Fine-tune on the training pairs of prepared data, with word-level distillation (`mtmoe.training.recovery`).

    Args:
        smaller: the model to train; stays as it is.
        parent: the model to follow, of the same vocabulary.
        data: the prepared data that the model was trained on, or other with its dictionary.
        directions: to train on; those without training text are left out.
        options: how.
        max_tokens: source or target tokens of a batch, padding included.
        seed: of the order of the text.
        device: torch's name of a device.
        progress: told the number of updates done and the last loss.

    Returns:
        The fine-tuned model, in the number types of `smaller`.

    Raises:
        DataError: the data has another dictionary, or no training text, or the model begins translations in a way that
            prepared data has not.
    """
    if smaller.languages.decoder_start != "tag":
        raise DataError(
            f"the decoder of this model starts with {smaller.languages.decoder_start!r}, but prepared data is for "
            "models of mtmoe's own training; recover it where it was trained"
        )
    if (data / "dict.txt").read_bytes() != smaller.dictionary.read_bytes():
        raise DataError(f"{data / 'dict.txt'} is not the model's dictionary: the text has other numbers of pieces")
    student, teacher = (Translator.from_stored(model, device=device) for model in (smaller, parent))
    config = smaller.config
    batches = training_batches(
        data,
        directions,
        student.vocabulary.tags,
        encoder_langtok=smaller.languages.encoder_langtok,
        max_tokens=max_tokens,
        longest=min(128, config.max_source_positions, config.max_target_positions),
        seed=seed,
        device=device,
    )
    recover(student.model, teacher.model, batches, options, progress)
    trained = stored_tensors(student.model)
    return replace(
        smaller, tensors={name: trained[name].to("cpu", tensor.dtype) for name, tensor in smaller.tensors.items()}
    )
