"""`ElasticTrainer`: the Hugging Face Trainer, with a set of sub-networks in every step.

Logging, schedules, mixed precision, gradient accumulation, callbacks and distributed training are
the Trainer's. Added here: the loss over sub-networks, evaluation over a grid, data order and
checkpoints that make an interrupted run end with the weights of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from dynabert_fast.data import (
    Collator,
    EncodedDataset,
    LengthGroupedSampler,
    TokenBudgetSampler,
)
from dynabert_fast.errors import InputError, SaveError
from dynabert_fast.evaluation.grid import make_batches, score_grid, total_score
from dynabert_fast.files import is_write_failure, save_error, whole_folder, write_manifest
from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_fast.models.packed import PackedSequences
from dynabert_fast.subnet import Subnet
from dynabert_fast.training.batches import PackingCollator, batch_shares
from dynabert_fast.training.losses import Distillation, TreeDistillation
from dynabert_fast.training.memory import StepMemory, reused_memory, step_memory
from dynabert_fast.training.schedules import Schedule
from dynabert_fast.training.watch import LossWatch, all_finite, bad_weights
from dynabert_fast.tree import SubnetTree

#: Name of the sum of the primary metric over the grid, which chooses the best checkpoint.
GRID_SUM = "grid_sum"

#: The training argument that computes layers again in the backward pass; it has had two names.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)

#: Steps whose draws are looked at for the memory that training will take.
_DRAWS = 100

_logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def widen(model: nn.Module) -> None:
    """Weights in 16 bits become float32, in place: gradients and steps are below their last bits.

    To compute in 16 bits is autocast's, see `TrainingOptions.precision`.
    """
    if model.dtype in (torch.float16, torch.bfloat16):
        model.float()


def check_readable(who: str, config: DynaBertConfig, examples: EncodedDataset) -> None:
    """Refuse examples that a model cannot read, of which a GPU would not say so.

    Args:
        who: The model, in messages.
        config: Its configuration.
        examples: What it is to read.

    Raises:
        InputError: As said.
    """
    if examples.largest_id >= config.vocab_size:
        raise InputError(
            f"the {who}'s token ids are in 0 to {config.vocab_size - 1}, got "
            f"{examples.largest_id}; is this the checkpoint's own tokenizer?"
        )
    if examples.largest_type >= config.type_vocab_size:
        raise InputError(
            f"the {who} knows {config.type_vocab_size} types of token, the examples have "
            f"{examples.largest_type + 1}, as for pairs of texts; is this the checkpoint's own "
            "tokenizer?"
        )
    longest = max(examples.lengths, default=0)
    if longest > config.max_tokens:
        raise InputError(
            f"the {who} reads at most {config.max_tokens} tokens, an example has {longest}; "
            "lower max_length"
        )


class ElasticTrainer(Trainer):
    """Trains sub-networks of one model together: each step sums their gradients.

    Args:
        model: The student.
        args: Hugging Face training arguments, see `stages.TrainingOptions.arguments`.
        subnets: Sub-networks of every step, in order.
        train_dataset: Encoded examples.
        eval_dataset: Encoded examples with labels, for the grid.
        data_collator: Pads a batch.
        metric: Primary metric, as `compute_metrics` takes it.
        eval_subnets: Sub-networks to evaluate; default `subnets`.
        teacher: With `recipe`: the fixed model that the student learns from. Without, the student
            learns from labels.
        recipe: The distillation loss.
        tokens_per_step: Real tokens of an optimiser step, as in `TrainingOptions`.
        schedule: Which of `subnets` each step takes; default all.
        subnets_per_pass: At most so many in one forward and backward pass; default all of a step's.
            Fewer need less memory for activations and more time.
        save_every: Also save a checkpoint every so many steps (0: only after each epoch).
        **kwargs: Of `transformers.Trainer`.

    Raises:
        InputError: Examples have token ids or types that a model does not have, or are too long.
    """

    def __init__(
        self,
        model: DynaBertForSequenceClassification,
        args: TrainingArguments,
        subnets: Sequence[Subnet],
        train_dataset: EncodedDataset,
        eval_dataset: EncodedDataset,
        data_collator: Collator,
        metric: str,
        eval_subnets: Sequence[Subnet] | None = None,
        teacher: DynaBertForSequenceClassification | None = None,
        recipe: Distillation | None = None,
        tokens_per_step: int | None = None,
        schedule: Schedule | None = None,
        subnets_per_pass: int | None = None,
        save_every: int = 0,
        **kwargs: Any,
    ) -> None:
        assert (teacher is None) == (recipe is None), "a teacher and a recipe go together"
        check_readable("model", model.config, train_dataset)
        check_readable("model", model.config, eval_dataset)
        if teacher is not None:
            check_readable("teacher", teacher.config, train_dataset)
        widen(model)
        # The Trainer would use DataParallel, which cannot split packed sequences.
        if args.n_gpu > 1:
            _logger.warning(
                "one process trains on one GPU; to use all %d: torchrun --nproc-per-node %d",
                args.n_gpu,
                args.n_gpu,
            )
            args._n_gpu = 1
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            **kwargs,
        )
        self.subnets = tuple(subnets)
        self.eval_subnets = tuple(eval_subnets or subnets)
        self.schedule = schedule or Schedule()
        self.subnets_per_pass = subnets_per_pass
        self.metric = metric
        self.recipe = recipe
        self.teacher = teacher
        self._shares: list[tuple[Tensor, Tensor]] = []  # of the step's batches that are to come
        if teacher is not None:
            teacher.to(self.args.device).eval().requires_grad_(False)

        @functools.lru_cache(maxsize=64)
        def lesson(tree: SubnetTree, before: tuple[Subnet, ...]) -> TreeDistillation:
            assert recipe is not None
            assert teacher is not None
            return TreeDistillation(recipe, teacher.config, tree, before)

        self._lesson = lesson
        self._make_passes = functools.lru_cache(maxsize=64)(_make_passes)
        self._eval_batches = make_batches(
            eval_dataset, data_collator, args.per_device_eval_batch_size
        )
        lengths = train_dataset.lengths
        self._sampler: LengthGroupedSampler | TokenBudgetSampler
        if tokens_per_step is None:
            size = args.train_batch_size * args.world_size
            self._sampler = LengthGroupedSampler(lengths, size, args.seed)
        else:
            parts = args.world_size * args.gradient_accumulation_steps
            self._sampler = TokenBudgetSampler(lengths, tokens_per_step, parts, args.seed)
        self.add_callback(_ChooseEpoch(self._sampler))
        self._watch = LossWatch(self.accelerator, Path(args.output_dir))
        self._saved_step = 0  # of the checkpoint before the next: saved here, or resumed from
        self.add_callback(_Watching(self))
        if save_every:
            self.add_callback(_SaveEvery(save_every))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's; on a CPU, freed memory is used again without asking the system."""
        on_cpu = self.args.device.type == "cpu"
        with reused_memory() if on_cpu else contextlib.nullcontext():
            return super().train(*args, **kwargs)

    def step_memory(self) -> tuple[StepMemory, int]:
        """An estimate of the peak, and the tokens of the largest batch that it is for.

        Where sub-networks are drawn, of the largest among the first steps.
        """
        lengths = self._sampler.lengths.tolist()
        tokens = sum(sorted(lengths, reverse=True)[: self.args.train_batch_size])
        if isinstance(self._sampler, TokenBudgetSampler):
            tokens = self._sampler.largest
        hidden = self.recipe is not None and self.recipe.hidden > 0
        model: Any = self.model
        found: list[StepMemory] = []
        for step in range(1 if self.schedule.kind == "grid" else _DRAWS):
            passes = self._passes(step)
            teachers = tuple(self._lesson(t, ()).teachers for t in passes) if self.teacher else ()
            found.append(
                step_memory(
                    model.config,
                    model.num_parameters(),
                    self.teacher.num_parameters() if self.teacher else 0,
                    passes,
                    teachers,
                    tokens,
                    half=self.args.bf16 or self.args.fp16,
                    hidden=hidden,
                    checkpointing=bool(getattr(self.args, CHECKPOINTING)),
                )
            )
        return max(found, key=lambda memory: memory.total), tokens

    # --- one step ---------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """A step's batches in this process, and in passing what each of them counts for."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._shares = batch_shares([_counts(batch) for batch in batches], device)
        return batches, items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of the step's sub-networks; gradients add up in the parameters.

        Returns:
            The sum of the sub-networks' losses, detached: this batch's part of the step's mean.
        """
        model.train()
        if isinstance(model, DistributedDataParallel):
            # It would copy every hidden state, for losses that are changed in place.
            model._set_ddp_sink_clone(False)
        inputs = self._prepare_inputs(inputs)
        if not isinstance(inputs.get("attention_mask"), PackedSequences):  # another collator's
            shape = tuple(inputs["input_ids"].shape)
            mask = PackedSequences.from_mask(shape, inputs.get("attention_mask"), self.args.device)
            inputs = {**inputs, "attention_mask": mask}
        # A call that is not `train`'s is a step of one batch.
        shares = (self._shares or batch_shares([_counts(inputs)], self.args.device)).pop(0)
        teaching = _Teaching()
        passes = self._passes(self.state.global_step)
        of_passes: list[Tensor] = []
        for tree in passes:
            # Processes exchange gradients once a step, in the last backward.
            last = tree is passes[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    losses = self._pass_loss(model, inputs, tree, teaching)
                    # Means over the examples, and the tokens, of the whole step.
                    parts = [x * s.to(x.dtype) for x, s in zip(losses, shares, strict=True)]
                    loss = torch.stack(parts).sum()
                self.accelerator.backward(loss)
            of_passes.append(loss.detach())
        found = torch.stack(of_passes)
        self._watch_loss(inputs, found)
        total = found.sum()
        # fp16 goes on after a loss that is not finite, which should not spoil the mean.
        return total if self.accelerator.scaler is None else total.nan_to_num(0.0, 0.0, 0.0)

    def _passes(self, step: int) -> tuple[SubnetTree, ...]:
        """A step's sub-networks; those that share most come together in one pass."""
        subnets = self.schedule.choose(self.subnets, self.args.seed, step)
        return self._make_passes(subnets, self.subnets_per_pass or len(subnets))

    def _pass_loss(
        self, model: nn.Module, inputs: dict[str, Any], tree: SubnetTree, teaching: _Teaching
    ) -> tuple[Tensor, Tensor]:
        """The summed losses of a tree's sub-networks: means over examples, and over tokens.

        They come from labels, or from the teacher's logits and hidden states, or from all three,
        and from the logits of assistants.
        """
        if self.recipe is None or self.teacher is None:
            loss = model(**inputs, subnet=tree).loss
            return loss, torch.zeros_like(loss)
        lesson = self._lesson(tree, tuple(teaching.before))
        given, inputs = inputs, {name: x for name, x in inputs.items() if name != "labels"}
        arguments = {"output_hidden_states": self.recipe.hidden > 0, "unpack": False}
        if lesson.teachers.subnets != teaching.subnets:
            teaching.output = None  # before the next teacher's states are there
            with torch.no_grad(), self.accelerator.autocast():
                teaching.output = self.teacher(**inputs, subnet=lesson.teachers, **arguments)
            teaching.subnets = lesson.teachers.subnets
        labels = self.recipe.labels
        output = model(**(given if labels else inputs), subnet=tree, **arguments)
        taught = teaching.output
        of_logits, of_hidden = lesson(
            output.logits,
            taught.logits,
            output.hidden_states or (),
            taught.hidden_states or (),
            teaching.said,
        )
        if self.recipe.assistant:
            teaching.before += tree.subnets
            teaching.said += output.logits.detach()
        return of_logits + labels * output.loss if labels else of_logits, of_hidden

    def _watch_loss(self, inputs: dict[str, Any], loss: Tensor) -> None:
        """Stop training, and save the batch, where a loss (one, or one a pass) is not finite."""
        step = self.state.global_step + 1
        self._watch.add(step, float(self.state.epoch or 0), inputs, loss)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of like length, or of like totals, in an order that only (seed, epoch) decide."""
        batches: dict[str, Any] = {"batch_sampler": self._sampler}
        if isinstance(self._sampler, LengthGroupedSampler):
            batches = {
                "sampler": self._sampler,
                "batch_size": self.args.train_batch_size,
                "drop_last": self.args.dataloader_drop_last,
            }
        else:  # whole steps: nothing to make up for, which accelerate does by counting examples
            self.accelerator.even_batches = False
        loader = DataLoader(
            self.train_dataset,
            **batches,
            collate_fn=PackingCollator(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
        )
        return self.accelerator.prepare(loader)

    # --- evaluation -------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: EncodedDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate every sub-network of `eval_subnets`.

        Returns:
            `<prefix>_<sub-network>_<metric>` for each, and `<prefix>_grid_sum`, the sum of the
            primary metric over them.
        """
        self._watch.finish()  # no losses are left that nobody looked at
        if self.is_in_train and self._anyone(not all_finite(self.model.parameters())):
            raise bad_weights(self.state.global_step)
        batches = self._eval_batches
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            size = self.args.per_device_eval_batch_size
            batches = make_batches(eval_dataset, self.data_collator, size)
        scores = score_grid(
            self.model, batches, self.eval_subnets, self.metric, progress=not self.args.disable_tqdm
        )
        metrics = {
            f"{metric_key_prefix}_{subnet}_{name}": value
            for subnet, values in scores.items()
            for name, value in values.items()
        }
        metrics[f"{metric_key_prefix}_{GRID_SUM}"] = total_score(scores)
        self.log(dict(metrics))
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control: TrainerControl = control
        return metrics

    # --- checkpoints ------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint that is whole or absent, then delete what nobody needs any more.

        Raises:
            TrainingError: The weights, or a loss that led to them, are not finite.
            SaveError: The system refused a write, in every process where it does so in one.
        """
        self._watch.finish()
        if self._anyone(not all_finite(self.model.parameters())):
            raise bad_weights(self.state.global_step)
        run = Path(self.args.output_dir)
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.store_flos()
        self.state.best_model_checkpoint = self._best_checkpoint(run)
        aside = folder.with_name(f".{folder.name}.saving")  # which the main process makes
        with contextlib.ExitStack() as writer:
            if self.args.should_save:
                self.together(folder, lambda: writer.enter_context(whole_folder(folder)))
            else:
                self.together(folder)
            self.together(folder, lambda: self._write_checkpoint(aside))

            def complete() -> None:
                if self.args.should_save:
                    write_manifest(aside)
                writer.close()

            self.together(folder, complete)  # everyone has written
        if self.args.should_save:
            self._delete_old_checkpoints(run, folder)
        self._saved_step = self.state.global_step

    def _write_checkpoint(self, folder: Path) -> None:
        """What this process has to write."""
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self._save_callbacks()
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def together(self, target: Path, part: Callable[[], Any] = lambda: None) -> None:
        """Do a part of a save, and wait until every process has done it.

        Raises:
            SaveError: The system refused a write, here or in another process: no process waits for
                one that has stopped.
        """
        failure: Exception | None = None
        try:
            part()
        except Exception as error:  # see `is_write_failure`
            if not is_write_failure(error):
                raise
            failure = error
        if self._anyone(failure is not None):
            if isinstance(failure, SaveError):
                raise failure
            failure = failure or OSError("another process could not write")
            raise save_error(target, failure) from failure

    def _anyone(self, flag: bool) -> bool:
        """Whether a flag is set in any process; all must ask."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor([float(flag)], device=self.args.device)
        return bool(self.accelerator.reduce(flags, reduction="sum") > 0)

    def _best_checkpoint(self, run: Path) -> str | None:
        """Folder of the best step so far: that of this save, or one that is there."""
        step = self.state.best_global_step
        if not step:
            return None
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        return str(best) if step == self.state.global_step or best.is_dir() else None

    def _save_callbacks(self) -> None:
        """Put the state of callbacks that export one into the trainer's state."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _delete_old_checkpoints(self, run: Path, newest: Path) -> None:
        """Keep the best, the newest, and the one before in case the newest gets damaged."""
        keep = {newest.name, Path(self.state.best_model_checkpoint or newest).name}
        keep.add(f"{PREFIX_CHECKPOINT_DIR}-{self._saved_step}")
        for step, folder in checkpoints(run):
            if folder.name not in keep and step < self.state.global_step:
                shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Teaching:
    """What the teacher said in a step, and as which sub-networks; what earlier passes said.

    Attributes:
        subnets: The teacher's sub-networks.
        output: What they said.
        before: The students of earlier passes, where others may learn from them.
        said: The logits of each.
    """

    subnets: tuple[Subnet, ...] = ()
    output: Any = None
    before: list[Subnet] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)


def _counts(inputs: dict[str, Any]) -> tuple[int, int]:
    """Examples and real tokens of a batch."""
    return len(inputs["input_ids"]), inputs["attention_mask"].tokens


def _make_passes(subnets: tuple[Subnet, ...], most: int) -> tuple[SubnetTree, ...]:
    """Trees of at most so many sub-networks.

    Where the first layer is another nothing is shared, and buffers of the narrower would be as
    wide as those of the wider: if they do not all fit, a pass ends there rather than later. Of a
    width the deeper come first, of which the others may learn.
    """
    if most >= len(subnets):
        return (SubnetTree(subnets),)

    def path(s: Subnet) -> list[tuple[float, int, int]]:
        steps = zip(s.layers, s.heads, s.neurons, strict=True)
        return [*((layer, -heads, -neurons) for layer, heads, neurons in steps), (math.inf, 0, 0)]

    passes: list[list[Subnet]] = []
    for _, branch in itertools.groupby(sorted(subnets, key=path), lambda s: path(s)[0]):
        own = list(branch)
        if passes and len(passes[-1]) + len(own) <= most:
            passes[-1] += own
        else:
            passes += [own[i : i + most] for i in range(0, len(own), most)]
    return tuple(SubnetTree(own) for own in passes)


class _ChooseEpoch(TrainerCallback):
    """Tells the sampler which epoch begins: accelerate's wrappers do not always pass it on.

    (Those of a loader that skips batches in several processes do not, in accelerate 1.15.)
    """

    def __init__(self, sampler: LengthGroupedSampler | TokenBudgetSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class _Watching(TrainerCallback):
    """Has all losses looked at before an evaluation, and knows where a run begins."""

    def __init__(self, trainer: ElasticTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        self.trainer._watch.clear()
        self.trainer._saved_step = state.global_step
        if args.world_size > 1:  # or all processes drop the same, and learn less from as much
            torch.manual_seed(args.seed + args.process_index)

    def on_epoch_end(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        self.trainer._watch.finish()


class _SaveEvery(TrainerCallback):
    """Asks for a checkpoint every so many steps, whatever the evaluation strategy is."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # An epoch's last step is saved after its evaluation, and only then: a run resumed from an
        # earlier save of it would never evaluate that epoch, and could miss the best checkpoint.
        last = control.should_training_stop or float(state.epoch).is_integer()
        control.should_save |= state.global_step % self.steps == 0 and not last


def checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints under an output folder, oldest first."""
    folders = Path(run).iterdir() if Path(run).is_dir() else ()
    found = ((_CHECKPOINT.fullmatch(folder.name), folder) for folder in folders)
    return sorted((int(match[1]), folder) for match, folder in found if match)
