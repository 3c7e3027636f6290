"""The control of `lmoe eval --retrain`: one LoRA as large as all experts together, trained while one waits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from lmoe_cli.cli.judged import Judged
from lmoe_cli.cli.output import Output
from lmoe_cli.cli.placing import Placing
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from lmoe_cli.findings import Finding
    from lmoe_cli.loadout.loadout import Loadout

NAME = "retrained"


def require_unseen(files: Sequence[Path], judged: Judged) -> None:
    """Refuse to train on what is judged by.

    Raises:
        UsageError: A file is both, and does not say what of it is held out.
    """
    from lmoe_cli.data.records import data_hash
    from lmoe_cli.evaluate.domains import has_splits

    used = {data_hash(path): path for path in judged.data.values()}
    for path in files:
        if data_hash(path) in used and (judged.split in ("all", "train") or not has_splits(path)):
            message = f"--retrain {path}: it would be trained on what it is judged by"
            hint = 'lines with "split": "train" and "split": "valid", or another file'
            raise UsageError("usage", message, hint=hint, where=str(path))


class Control(NamedTuple):
    """What was trained to compare with."""

    others: Mapping[str, Loadout]
    """`NAME` → a loadout of the base and this one expert."""
    facts: Mapping[str, Any] | None
    """What is known of it; None where nothing was trained."""
    findings: Sequence[Finding]
    """What was told meanwhile."""


@contextmanager
def control(
    files: Sequence[Path],
    judged: Judged,
    loadout: Loadout,
    epochs: float,
    rate: float,
    seed: int,
    placing: Placing,
    out: Output,
) -> Iterator[Control]:
    """Train one LoRA of the experts' total size into a folder that is gone after the block.

    Args:
        files: To be trained on, but for lines that are held out; with none, nothing is trained.
        judged: What must not be trained on.
        loadout: Whose experts it stands against.
        epochs: Passes over the files.
        rate: Learning rate, at its peak.
        seed: Of everything random.
        placing: Where to, the token for the Hub, and whether the base may run code of its own.
        out: Told how it goes.
    """
    if not files:
        yield Control({}, None, ())
        return
    require_unseen(files, judged)
    from lmoe_cli.cli.train import View
    from lmoe_cli.evaluate.same_size import about_size, numbers_of, same_size
    from lmoe_cli.loadout.loadout import resolve
    from lmoe_cli.loadout.parse import read_recipe
    from lmoe_cli.loadout.write import moved
    from lmoe_cli.train.config import TrainConfig
    from lmoe_cli.train.order import Order
    from lmoe_cli.train.training import train

    size = same_size(loadout, trust_remote_code=placing.trust_remote_code)
    with TemporaryDirectory(prefix="lmoe-") as temporary:
        folder = Path(temporary)
        expert = {"rank": size.rank, "targets": size.targets, "data": [str(path.resolve()) for path in files]}
        config = TrainConfig.model_validate(
            {
                "name": NAME,
                "base": moved(loadout, folder).base,
                "experts": {NAME: expert},
                "stages": [{"train": "experts"}],
                "trainer": {"epochs": epochs, "learning_rate": rate, "seed": seed},
            }
        )
        kinds = sorted({name.rpartition(".")[2] for name in size.targets})
        out.say(f"training one LoRA of rank {size.rank} on {len(size.targets)} modules: {', '.join(kinds)}")
        order = Order(
            config,
            folder,
            folder / "out",
            device=placing.device,
            token=placing.token,
            trust_remote_code=placing.trust_remote_code,
        )
        with View(out, config.trainer.log_every) as view:
            train(order, view.tell)
        recipe = folder / "out" / "recipe.yaml"
        found = resolve(read_recipe(recipe), NAME, beside=recipe.parent, token=placing.token)
        numbers = numbers_of(found.experts)
        odd = about_size(size, numbers)
        out.warn(odd)
        facts = {
            "files": [str(path) for path in files], "rank": size.rank, "targets": size.targets,
            "parameters": numbers, "parameters_of_experts": size.numbers, "epochs": epochs, "learning_rate": rate,
        }  # fmt: skip
        yield Control({NAME: found}, facts, [*view.warnings, *odd])
