"""The whole preparation: read, clean, vocabulary, binarise, summary; restartable and atomic."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from mtmoe.data import summary
from mtmoe.data.binarise import binarise_pair, count_ids
from mtmoe.data.clean import Cleaner, write_clean_text
from mtmoe.data.fetch import check_sum, default_cache, fetch_wheel
from mtmoe.data.progress import Progress
from mtmoe.data.readers import READERS
from mtmoe.data.recipe import Input, Recipe
from mtmoe.data.rows import Pair, Row, pair_name
from mtmoe.data.stages import Stages, fingerprint
from mtmoe.data.vocabulary import dictionary_text, load_vocabulary, train_vocabulary
from mtmoe.data.wheel import read_wheel
from mtmoe.errors import DataError
from mtmoe.files import write_json, write_text

FORMAT = 1
"""Version of the prepared folder."""

CODE = 1
"""Version of what this package does to the text; raise it when the same recipe would give another result."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A finished data folder."""

    folder: Path
    data: Mapping[str, Any]
    """What data.json holds."""
    counts: summary.Counts
    """What summary.json holds: by pair and split, how many were read, kept, and dropped by reason."""
    fresh: bool
    """False if the folder was there already, from the same recipe and inputs."""


def prepare(
    recipe: Recipe,
    output: str | Path,
    *,
    cache: str | Path | None = None,
    wheel: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Make a data folder for fairseq out of a recipe.

    The work is done in ``OUTPUT.partial``, which becomes ``OUTPUT`` when everything is there. A run that was cut off is
    taken up again by the next one with the same recipe, and gives the same folder, byte for byte.

    Args:
        recipe: see `load_recipe`.
        output: the folder to make.
        cache: where fetched wheels are kept; by default ``~/.cache/mtmoe``.
        wheel: a wheel that is here already, for recipes that fetch one.
        force: replace a folder that holds other data. The old one stays until the new one is whole.
        progress: told what happens.

    Returns:
        The folder, and what is in it.

    Raises:
        DataError: an input is missing or broken (then nothing was written), or `output` holds something else.
    """
    output = Path(output)
    progress = progress or Progress()
    sources = _locate(recipe, Path(cache) if cache else default_cache(), Path(wheel) if wheel else None, progress)
    sums = [[check_sum(path, source.sha256) for path in paths] for source, paths in sources]
    mark = fingerprint([FORMAT, CODE, recipe.settings(), sums, sentencepiece.__version__])
    partial = output.with_name(f"{output.name}.partial")
    retired = output.with_name(f"{output.name}.old")
    if retired.exists() and not output.exists():  # killed between the two renames of _install
        os.replace(retired, output)
    present = _finished(output)
    if present is not None and present["fingerprint"] == mark:
        return Prepared(output, present, _load_json(output / "summary.json"), fresh=False)
    _refuse_to_overwrite(output, present, recipe, force)
    ready = _finished(partial)
    if ready is None or ready["fingerprint"] != mark:
        _build(recipe, sources, sums, mark, partial, progress)
    Stages(partial).forget()
    _install(partial, output, retired)
    return Prepared(output, _load_json(output / "data.json"), _load_json(output / "summary.json"), fresh=True)


Sources = Sequence[tuple[Input, Sequence[Path]]]


def _locate(recipe: Recipe, cache: Path, wheel: Path | None, progress: Progress) -> Sources:
    """Find the files of every input, fetching what is fetched."""
    if wheel is not None and all(source.type != "wheel" for source in recipe.inputs):
        raise DataError(f"a wheel was given, but the recipe {recipe.name!r} reads none")
    found: list[tuple[Input, Sequence[Path]]] = []
    for source in recipe.inputs:
        if source.type == "wheel":
            assert source.file is not None
            if wheel is None and not (cache / source.file).exists():
                progress.say(f"fetching {source.file} with pip into {cache}")
            found.append((source, [fetch_wheel(source, cache, wheel)]))
        else:
            names = source.paths or (source.path or "",)
            found.append((source, [recipe.folder / name for name in names]))
    return found


def _rows(recipe: Recipe, sources: Sources) -> Iterator[Row]:
    pairs = set(recipe.wanted_pairs())
    for source, paths in sources:
        if source.type == "wheel":
            yield from read_wheel(source, paths[0], pairs)
        else:
            yield from READERS[source.type](source, paths, pairs)


def _build(
    recipe: Recipe, sources: Sources, sums: list[list[str]], mark: str, folder: Path, progress: Progress
) -> None:
    """Fill the folder stage by stage, data.json last."""
    stages = Stages(folder)
    (folder / "data.json").unlink(missing_ok=True)
    settings = recipe.settings()
    of_text = {name: value for name, value in settings.items() if name not in ("vocabulary", "resource", "shard_size")}
    text_mark = fingerprint([CODE, of_text, sums])
    done = stages.result("clean", text_mark)
    text = folder / "text"
    if done is None:
        cleaner = Cleaner(recipe)
        rows = progress.track("checking the inputs, cleaning valid and test", _rows(recipe, sources))
        evaluation = cleaner.evaluation(rows)

        def clean() -> Mapping[str, Any]:
            def train_rows() -> Iterator[Row]:
                return progress.track("cleaning train", _rows(recipe, sources))

            write_clean_text(recipe, train_rows, evaluation, cleaner, text)
            names = [pair_name(pair) for pair in recipe.wanted_pairs()]
            return summary.plain_counts(cleaner.counts, [name for name in names if name in cleaner.counts])

        with stages.locked():
            done = stages.run("clean", text_mark, [text], clean)
    else:
        progress.say("clean text is there from an earlier run")
    with stages.locked():
        _binarise(recipe, stages, text_mark, done, progress)
        for left_over in folder.rglob(".*.tmp"):  # of a file that was being written when the process was killed
            left_over.unlink()
        _describe(recipe, mark, done, folder)


def _binarise(recipe: Recipe, stages: Stages, text_mark: str, counts: summary.Counts, progress: Progress) -> None:
    """Train the vocabulary and write the datasets and the dictionary."""
    folder = stages.folder
    pairs = _pairs(counts)
    languages = sorted({code for pair in pairs for code in pair})
    model = folder / "spm.model"
    vocabulary_mark = fingerprint([text_mark, recipe.settings()["vocabulary"], sentencepiece.__version__])

    def vocabulary() -> Mapping[str, Any]:
        progress.start(f"training SentencePiece, {recipe.vocabulary.size:,} pieces")
        train_vocabulary(folder / "text", pairs, recipe.vocabulary, model)
        progress.finish()
        return {}

    outputs = [model, folder / "spm.vocab", folder / "bin", *stages.stamps.glob("binarise-*.json")]
    stages.run("vocabulary", vocabulary_mark, outputs, vocabulary)
    processor = load_vocabulary(model)
    progress.start("binarising", len(pairs))
    for pair in pairs:
        stages.run(
            f"binarise-{pair_name(pair)}",
            fingerprint([vocabulary_mark, recipe.shard_size]) if recipe.shard_size else vocabulary_mark,
            [],
            lambda pair=pair: binarise_pair(  # type: ignore[misc]
                processor, folder / "text", folder / "bin", pair, len(languages), recipe.shard_size
            ),
        )
        progress.advance()
    progress.finish()
    ids = count_ids(folder / "bin", pairs, processor.get_piece_size() + 1)
    write_text(folder / "dict.txt", dictionary_text(processor, ids, languages))


def _describe(recipe: Recipe, mark: str, counts: summary.Counts, folder: Path) -> None:
    """Write languages.json, the summaries, and data.json as the last file of all."""
    pairs = _pairs(counts)
    sizes = {name: {split: row["kept"] for split, row in splits.items()} for name, splits in counts.items()}
    languages = sorted({code for pair in pairs for code in pair})
    by_language = {code: sum(sizes[pair_name(pair)]["train"] for pair in pairs if code in pair) for code in languages}
    dictionary = (folder / "dict.txt").read_text(encoding="utf-8")
    data = {
        "format": FORMAT,
        "recipe": recipe.name,
        "fingerprint": mark,
        "source": " ".join(recipe.source.split()),
        "licence": " ".join(recipe.licence.split()),
        "attribution": " ".join(recipe.attribution.split()),
        "vocabulary_size": dictionary.count("\n") + 4,
        "pairs": sizes,
        "train_pairs_by_language": by_language,
        "resource": {code: recipe.resource.level(code, by_language[code]) for code in languages},
        "settings": recipe.settings(),
    }
    directions = sorted(f"{x}-{y}" for a, b in pairs for x, y in ((a, b), (b, a)))
    write_json(folder / "languages.json", {"languages": languages, "directions": directions})
    write_json(folder / "summary.json", counts)
    write_text(folder / "summary.md", summary.markdown(recipe, counts, data))
    write_json(folder / "data.json", data)


def _pairs(counts: summary.Counts) -> list[Pair]:
    """The pairs of which anything is left; one that has evaluation sets only is there for zero-shot scores."""
    pairs = [tuple(name.split("-")) for name, splits in counts.items() if any(row["kept"] for row in splits.values())]
    if not any(splits["train"]["kept"] for splits in counts.values()):
        raise DataError("nothing is left to train on: no input has the wanted pairs, or the cleaning drops them all")
    return [(a, b) for a, b in pairs]


def _finished(folder: Path) -> dict[str, Any] | None:
    """Read data.json of a folder that is whole; None if it is not, or not there."""
    if not (folder / "data.json").exists():
        return None
    return _load_json(folder / "data.json")


def _load_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable ({error}); remove the folder and prepare it again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a mapping; remove the folder and prepare it again")
    return value


def _refuse_to_overwrite(output: Path, present: dict[str, Any] | None, recipe: Recipe, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: is a file; give a folder")
    if present is not None and not force:
        what = (
            "from other settings or inputs"
            if present["recipe"] == recipe.name
            else f"of the recipe {present['recipe']!r}"
        )
        raise DataError(f"{output}: holds prepared data {what}; use --force to replace it, or another --output")
    if present is None and output.exists() and any(output.iterdir()):
        raise DataError(f"{output}: is not empty and holds no prepared data; give another folder")


def _install(partial: Path, output: Path, retired: Path) -> None:
    """Move the new folder into its place; an old one is removed only after that."""
    if retired.exists():
        shutil.rmtree(retired)
    if output.exists() and any(output.iterdir()):
        os.replace(output, retired)
    os.replace(partial, output)
    if retired.exists():
        shutil.rmtree(retired)
