"""Task suites of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), with the same variants on one base."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmoe_cli.engine.base_model import quietly
from lmoe_cli.errors import NotFoundError, UsageError
from lmoe_cli.evaluate.variants import Stage, Variant

COUNTS = ("sample_len",)
"""What lm-eval puts among a task's metrics and is none."""


class Suites:
    """Tasks of lm-eval, ready to be run.

    Args:
        tasks: Their names, or those of groups.
        include: Folder with tasks of one's own.

    Raises:
        UsageError: The extra is not installed.
        NotFoundError: There is no such task.
    """

    def __init__(self, tasks: Sequence[str], include: Path | None = None) -> None:
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            message = "--task needs lm-eval, which is not installed"
            raise UsageError("extra-missing", message, hint="pip install 'lmoe-cli[eval]'") from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of models that are loaded already, each time
        self._evaluate: Any = lm_eval.simple_evaluate
        self._wrap: Any = HFLM
        self._manager = TaskManager(include_path=str(include) if include else None)
        self.tasks = list(tasks)
        unknown = [task for task in self.tasks if not self._manager.match_tasks([task])]
        if unknown:
            hint = "lm-eval ls tasks lists them; --include-path names a folder with your own"
            raise NotFoundError("task-unknown", f"lm-eval has no task '{unknown[0]}'", hint=hint)

    def run(
        self,
        stage: Stage,
        variants: Sequence[Variant],
        *,
        limit: int | None = None,
        seed: int = 0,
        say: Callable[[str], None] = lambda _: None,
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Run all tasks under every variant.

        Args:
            stage: With the base loaded.
            variants: In the order in which they share banks.
            limit: Most documents of a task.
            seed: Of examples that tasks draw.
            say: Is told which variant runs.

        Returns:
            Variant → task → metric → value; ``metric_stderr`` is lm-eval's standard error.

        Raises:
            UsageError: A router decides per prompt, which lm-eval's batches do not show.
        """
        require_fixed_or_token(variants)
        found: dict[str, dict[str, dict[str, float]]] = {}
        for variant in variants:
            say(f"{variant.name}: {', '.join(self.tasks)}")
            engine = stage.take(variant)
            with quietly():
                model = self._wrap(
                    pretrained=engine.model, tokenizer=engine.tokenizer, backend="causal", batch_size=8,
                    max_length=min(engine.context, 1 << 15),
                )  # fmt: skip
                results = self._evaluate(
                    model=model, tasks=self.tasks, task_manager=self._manager, limit=limit, log_samples=False,
                    random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
                )  # fmt: skip
            found[variant.name] = {task: _numbers(own) for task, own in results["results"].items()}
        return found


def require_fixed_or_token(variants: Sequence[Variant]) -> None:
    """Refuse what decides per prompt: lm-eval hands tokens to the model, not conversations.

    Raises:
        UsageError: A variant does.
    """
    if any(variant.loadout.recipe.router.scope == "prompt" for variant in variants):
        message = "the recipe's router decides per prompt, and lm-eval's batches do not tell where prompts end"
        raise UsageError("router-dynamic", message, hint="use --data with the same texts")


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` → ``acc``."""
    return {
        key.removesuffix(",none").replace(",none", ""): float(value)
        for key, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in COUNTS
    }
