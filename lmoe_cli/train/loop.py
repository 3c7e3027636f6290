"""The loop of transformers' Trainer with lmoe's loss, and checkpoints that hold nothing but what is trained."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from lmoe_cli import files
from lmoe_cli.checkpoint.header import read_header
from lmoe_cli.checkpoint.index import gather
from lmoe_cli.checkpoint.raw import raw
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.checkpoint.writer import Shape, ShardWriter
from lmoe_cli.errors import LmoeError
from lmoe_cli.train.rows import Rows
from lmoe_cli.train.schedule import Stage
from lmoe_cli.train.spool import IGNORED
from lmoe_cli.train.trainee import Losses, Trainee

WEIGHTS = "trained.safetensors"
DIVERGED = "the last checkpoint is kept; to begin again: a lower learning rate, and --force"
RATES = {"learning_rate": "factors.", "gate_learning_rate": "gates."}
"""Of experts and of the gate → how names of their parameters begin."""


class NotFiniteError(LmoeError):
    """The loss is NaN or infinite."""


class Loop(Trainer):  # type: ignore[misc]
    """Trains a `Trainee`.

    Args:
        trainee: What is trained.
        args: Of transformers.
        rows: To learn from.
        held_out: Name → rows to be judged by.
        stage: Weights of the losses, and the two rates.
        rates: Learning rate of experts and of the gate.
        experts: Their names.
        tell: Is told of every step of the optimiser.
        callbacks: Of transformers.
    """

    def __init__(
        self,
        trainee: Trainee,
        args: TrainingArguments,
        rows: Rows,
        held_out: Mapping[str, Rows],
        stage: Stage,
        rates: tuple[float, float],
        experts: Sequence[str],
        tell: Callable[[dict[str, Any]], None],
        callbacks: Sequence[Any] = (),
    ) -> None:
        super().__init__(
            model=trainee,
            args=args,
            train_dataset=rows,
            eval_dataset=dict(held_out) or None,
            data_collator=rows.collate,
            callbacks=list(callbacks),
        )
        self.optimizer: Any
        self.control: Any
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._trainee, self._rows, self._held_out, self._stage, self._rates = trainee, rows, held_out, stage, rates
        self._choices = (*experts, "none")
        self._tell = tell
        self._pending: list[tuple[Losses, int]] = []
        self._rates_now: dict[str, float] = {}
        self._judged: tuple[int, dict[str, float]] | None = None
        self._started = time.perf_counter()

    def run(self, begun: Path | None) -> None:
        """Train to the end.

        Args:
            begun: A checkpoint to go on from. One that training ended with, at the last step or for want of
                improvement, is only taken up.

        Raises:
            NotFiniteError: The loss, or what is trained, is no number any more.
        """
        ended = TrainerState.load_from_json(str(begun / TRAINER_STATE_NAME)) if begun else None
        if begun and ended and ended.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            self._load_from_checkpoint(str(begun))
            self.state.global_step = ended.global_step
            if self.args.load_best_model_at_end and ended.best_model_checkpoint:
                self.state.best_model_checkpoint = str(begun.with_name(Path(ended.best_model_checkpoint).name))
                self._load_best_model()
        else:
            self.train(resume_from_checkpoint=str(begun) if begun else None)
        self._flush()
        self._require_finite("at the end")

    def _require_finite(self, when: str) -> None:
        if not all(bool(torch.isfinite(own).all()) for own in self._trainee.trained.values()):
            raise NotFiniteError("loss-not-finite", f"what is trained holds NaN or infinity {when}", hint=DIVERGED)

    # -- the loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch, scaled so that those of a step add up to the loss of all its tokens."""
        numbers = inputs.pop("numbers")
        losses: Losses = model(**inputs)
        items = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] != IGNORED).sum()
        loss = losses.nats / items * self.args.world_size
        if losses.gate:
            extra = self._stage.balance * losses.gate.balance + self._stage.z * losses.gate.z
            loss = loss + extra / self.current_gradient_accumulation_steps
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            message = f"the loss is {float(loss)} at step {step}, in the batch of {self._rows.where(numbers)}"
            raise NotFiniteError("loss-not-finite", message, hint=DIVERGED)
        self._pending.append((losses, int((inputs["labels"] != IGNORED).sum())))
        self._rates_now = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return (loss, losses) if return_outputs else loss

    def _save_checkpoint(self, *words: Any) -> None:
        """Tell of a step before it can be gone on from."""
        self._flush()
        super()._save_checkpoint(*words)

    def get_batch_samples(self, *words: Any) -> Any:
        """Tell of the step that is done before the next one begins."""
        self._flush()
        return super().get_batch_samples(*words)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Learned tokens of a step, when what processes repeat to have equally many rows at the end is forgotten."""
        size = self.args.per_device_train_batch_size
        rest = len(self._rows) % (size * self.args.world_size)
        if rest and batch_samples and self.accelerator.gradient_state.end_of_dataloader:
            batch_samples[-1]["labels"][max(rest - self.args.process_index * size, 0) :] = IGNORED
        return super()._get_num_items_in_batch(batch_samples, device)

    def _flush(self) -> None:
        if not self._pending:
            return
        now = time.perf_counter()
        total, count = sum_of([losses.nats for losses, _ in self._pending]), sum(own for _, own in self._pending)
        if self.args.world_size > 1:
            both = _over_processes(torch.stack([total, torch.tensor(float(count)).double()]), self.args.device)
            total, count = both[0], int(both[1])
        told: dict[str, Any] = {"step": self.state.global_step, "loss": float(total) / count, "tokens": count}
        told["tokens_per_s"] = round(count / max(now - self._started, 1e-9), 1)
        gates = [losses.gate for losses, _ in self._pending if losses.gate]
        if gates:
            for name in ("balance", "z", "entropy", "effective"):
                mean = torch.stack([getattr(gate, name).detach() for gate in gates]).mean()
                if self.args.world_size > 1:  # of each process its own part
                    dist.all_reduce(mean)
                    mean /= self.args.world_size
                told[name] = float(mean)
            loads = [round(one, 4) for one in torch.stack([gate.load for gate in gates]).mean(0).tolist()]
            told["load"] = dict(zip(self._choices, loads, strict=False))
        told |= self._rates_now
        told["memory"] = _memory()
        self._pending.clear()
        self._started = now
        if self.args.report_to:  # what else is to be told, such as TensorBoard
            named = {f"load/{name}": load for name, load in told.get("load", {}).items()}
            self.log({name: value for name, value in told.items() if name not in ("load", "step")} | named)
        if self.is_world_process_zero():
            self._tell(told)

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with a rate for experts and another one for the gate."""
        if self.optimizer is None:
            named = self._trainee.trained
            groups = [
                {"params": [own for key, own in named.items() if key.startswith(begin)], "lr": rate, "name": name}
                for (name, begin), rate in zip(RATES.items(), self._rates, strict=True)
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]], weight_decay=self.args.weight_decay
            )
        return self.optimizer

    # -- judging

    def evaluate(self, *words: Any, **named: Any) -> dict[str, float]:
        """Mean nats per token of what is held out, overall and by name."""
        self._flush()
        if self._judged is not None and self._judged[0] == self.state.global_step:
            return self._judged[1]
        self.model.eval()
        sums: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, rows in self._held_out.items():
                total = torch.zeros(2, dtype=torch.float64)
                size, world = self.args.per_device_eval_batch_size, self.args.world_size
                # All processes compute as many batches, since a base spread over them needs them all.
                for start in range(0, len(rows), size * world):
                    first = start + size * self.args.process_index
                    mine = [rows[number] for number in range(first, min(first + size, len(rows)))]
                    batch = rows.collate(mine or [rows[0]])
                    moved = {key: value.to(self.args.device) for key, value in batch.items() if key != "numbers"}
                    losses = self._trainee(**moved)
                    if mine:
                        count = (batch["labels"] != IGNORED).sum().double()
                        total += torch.stack([losses.nats.cpu().double(), count])
                sums[name] = total
        if self.args.world_size > 1:
            sums = {name: _over_processes(total, self.args.device) for name, total in sums.items()}
        everything = torch.stack(list(sums.values())).sum(0)
        metrics = {"eval_loss": float(everything[0] / everything[1].clamp(min=1))}
        metrics |= {f"eval_loss_{name}": float(own[0] / own[1].clamp(min=1)) for name, own in sums.items()}
        self._pending.clear()
        self._started = time.perf_counter()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_world_process_zero():
            self._tell({"step": self.state.global_step, "eval": metrics})
        self._judged = (self.state.global_step, metrics)
        return metrics

    # -- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        del state_dict
        self._require_finite(f"after step {self.state.global_step}")
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        files.make_folder(folder)
        tensors = {name: own.detach().to("cpu").contiguous() for name, own in self._trainee.trained.items()}
        shapes = {name: Shape("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
        with ShardWriter(folder / WEIGHTS, shapes, {"format": "pt"}) as file:
            for tensor in tensors.values():
                file.write(raw(tensor))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        del model
        path = Path(resume_from_checkpoint) / WEIGHTS
        stored = gather({WEIGHTS: read_header(path)}, None, str(path))
        with TensorReader(stored, lambda _: path) as reader, torch.no_grad():
            for name, own in self._trainee.trained.items():
                own.copy_(reader.tensor(name))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
            if self.state.best_global_step != self.state.global_step:
                self._judged = None


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """Their sum in float64, on the CPU: some devices know no float64."""
    return torch.stack([value.detach().cpu().double() for value in values]).sum()


def _over_processes(total: Tensor, device: torch.device) -> Tensor:
    moved = total.to(device)
    dist.all_reduce(moved)
    return moved.cpu()


def _memory() -> int:
    """Bytes on the device at most, or of the process where there is none."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
