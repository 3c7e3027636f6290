"""The data of a training: which records are learned from and which are held out, tokenised into a spool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmoe_cli.data.examples import Encoder, Example
from lmoe_cli.data.records import Record, data_hash
from lmoe_cli.data.splits import Split
from lmoe_cli.disk import is_there
from lmoe_cli.errors import InvalidFileError, NotFoundError
from lmoe_cli.loadout.examples import found_beside
from lmoe_cli.train.config import Data, TrainConfig, as_data
from lmoe_cli.train.rows import Rows
from lmoe_cli.train.spool import Owner, Spool

EVERYONE = -1
"""Number in place of an expert's, of data for all."""


@dataclass(frozen=True)
class Material:
    """What one stage is trained on."""

    rows: Rows
    held_out: Mapping[str, Rows]
    """Name of the expert, or ``all`` → rows; empty where nothing is held out."""
    told: str
    """What was cut or left out, for a person."""


@dataclass(frozen=True)
class Owned:
    """Data of one expert, or of all."""

    name: str
    expert: int
    data: Data


def sources_of(config: TrainConfig, experts: Sequence[str], *, is_for_experts: bool) -> list[Owned]:
    """Data of these experts; for a gate what the config has for all of them, if it has."""
    if not is_for_experts and config.data is not None:
        return [Owned("all", EVERYONE, data) for data in as_data(config.data)]
    return [
        Owned(name, number, data)
        for number, name in enumerate(experts)
        if (told := config.experts[name].data) is not None
        for data in as_data(told)
    ]


def files_read(config: TrainConfig, stages: Iterable[tuple[Sequence[str], bool]]) -> set[str]:
    """Files that some stages learn from, as the config names them.

    Args:
        config: Of the training.
        stages: Experts of each, and whether it is for experts.
    """
    return {
        name
        for experts, is_for_experts in stages
        for source in sources_of(config, experts, is_for_experts=is_for_experts)
        for name in source.data.train_files
    }


def holds_out(data: Data, folder: Path, seed: int) -> bool:
    """Read all records, keep none, and say whether any is held out.

    Raises:
        InvalidFileError: A line is none.
    """
    counts = [
        sum(1 for split in _splits(data, folder, seed, held_out=held_out) for _ in split) for held_out in (False, True)
    ]
    return counts[1] > 0


def data_files(config: TrainConfig, folder: Path) -> dict[str, Path]:
    """Every data file as the config names it, and where it is.

    Raises:
        NotFoundError: One is not there.
    """
    found: dict[str, Path] = {}
    everything = [config.data, *(expert.data for expert in config.experts.values())]
    for data in (one for value in everything if value is not None for one in as_data(value)):
        for name in [*data.train_files, *data.valid_files]:
            path = found_beside(name, folder)
            if not is_there(path):
                raise NotFoundError("not-found", f"{path}: no such data file", hint="see 'data'", where=str(path))
            found[name] = path
    return found


def hashes_of(config: TrainConfig, folder: Path) -> dict[str, str]:
    """Data file as the config names it → SHA-256."""
    return {name: data_hash(path) for name, path in data_files(config, folder).items()}


def gather_material(
    sources: Sequence[Owned], config: TrainConfig, folder: Path, work: Path, tokenizer: Any, limits: tuple[int, int]
) -> Material:
    """Read and tokenise the data of a stage.

    Args:
        sources: Whose data.
        config: Of the training.
        folder: Of the config.
        work: Folder for the spools, which must not be there yet.
        tokenizer: Of the base.
        limits: Most tokens the base can hold, and rows of its embedding.

    Raises:
        InvalidFileError: A record is wrong, or there is nothing to learn from.
    """
    trainer = config.trainer
    length = min(trainer.max_length, limits[0])
    encoder = Encoder(tokenizer, length, trainer.too_long, limits[1])
    spool = Spool(work / "train.tokens", _examples(sources, folder, encoder, trainer.seed, held_out=False))
    if not len(spool):
        files = ", ".join(name for source in sources for name in source.data.train_files)
        message = f"{files}: nothing to learn from" + (f" ({told})" if (told := encoder.tally.told()) else "")
        raise InvalidFileError("data-empty", message, hint="see 'split' on its lines, 'fraction', and 'max_length'")
    told = encoder.tally.told()
    rows = Rows(spool, list(spool.numbers()), packs=trainer.packing, length=length, seed=trainer.seed)
    held_out: dict[str, Rows] = {}
    for name in dict.fromkeys(source.name for source in sources):
        mine = [source for source in sources if source.name == name]
        examples = _examples(mine, folder, encoder, trainer.seed, held_out=True)
        own = Spool(work / f"{name}.valid.tokens", examples)
        named = [file for source in mine for file in source.data.valid_files]
        if named and not len(own):
            message = f"{', '.join(named)}: nothing that is held out"
            raise InvalidFileError("data-empty", message, hint="see 'split' on its lines, and 'max_length'")
        if len(own):
            held_out[name] = Rows(own, range(len(own)), packs=trainer.packing, length=length, seed=trainer.seed)
    return Material(rows, held_out, told)


def _examples(
    sources: Sequence[Owned], folder: Path, encoder: Encoder, seed: int, *, held_out: bool
) -> Iterator[tuple[Owner, Example]]:
    for source in sources:
        owner = Owner(source.expert, source.data.strength, source.data.repeat)
        for records in _splits(source.data, folder, seed, held_out=held_out):
            yield from ((owner, example) for example in encoder.examples(records))


def _splits(data: Data, folder: Path, seed: int, *, held_out: bool) -> Iterator[Iterator[Record]]:
    """Records of each file that are learned from, or held out."""
    splits = [Split(found_beside(name, folder), fraction=_fraction(data), seed=seed) for name in data.train_files]
    if held_out and data.valid_files:
        splits = [Split(path, valid=path) for name in data.valid_files for path in [found_beside(name, folder)]]
    yield from (split.held_out() if held_out else split.train() for split in splits)


def _fraction(data: Data) -> float:
    return 0.0 if data.valid_files or data.fraction is None else data.fraction
