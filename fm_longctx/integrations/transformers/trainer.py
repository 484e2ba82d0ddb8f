"""The Hugging Face Trainer over sharded sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fm_longctx.data import IGNORED
from fm_longctx.integrations.groups import Ranks, context_parallel_ranks
from fm_longctx.integrations.transformers.collator import DataCollatorForFlashMask, PlannedContext

if TYPE_CHECKING:
    # What the class is mixed into; transformers itself is imported by the user.
    from transformers import Trainer as _Base
else:
    _Base = object


class ContextParallelTrainerMixin(_Base):
    """Makes a Trainer spread each sequence over `context_parallel_size` consecutive ranks.

        class LongTrainer(ContextParallelTrainerMixin, Trainer): ...

        collator = DataCollatorForFlashMask(context_parallel_size=4)
        LongTrainer(model, args, train_dataset=dataset, data_collator=collator).train()

    The ranks that share a sequence are given the same samples, the mask's plan is joined to their group, and the
    Trainer's own loss over the rank's labels (`shift_labels`), divided by the step's labels on all ranks, is exact:
    ranks and micro-batches with uneven label counts weigh by their tokens. Works over DDP, FSDP and DeepSpeed. With a
    collator of `context_parallel_size=1` nothing changes.

    Evaluation gives the loss alone: logits are the rank's rows.

    A loss over whole sequences is a compute_loss of one's own, with transformers' mark that it is a mean, over a batch
    of a collator with `return_sequence_ids=True`:

        class LongDPO(ContextParallelTrainerMixin, Trainer):
            loss_is_scaled_for_ga = False

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                with torch.no_grad():
                    reference = sequence_log_probs(self.logits(frozen, inputs), inputs)
                return dpo_loss(sequence_log_probs(self.logits(model, inputs), inputs), reference, beta=0.1)

    Raises:
        ValueError: when training or evaluation begins, for another collator, ranks that do not divide, or arguments
            under which the loss would be wrong.
    """

    _context_ranks: Ranks | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Batches in which the ranks of a sequence get the same samples, shuffled by `data_seed` or `seed`."""
        if self._size() == 1:
            return super().get_train_dataloader()
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset.")
        return self._loader(self.train_dataset, self._train_batch_size, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As for training, in order."""
        if self._size() == 1:
            return super().get_eval_dataloader(eval_dataset)
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            by_name: Any = self.eval_dataset
            dataset = by_name[dataset]
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset.")
        return self._loader(dataset, self.args.eval_batch_size, shuffle=False)

    def logits(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The model's logits `[1, T, ...]`, for a compute_loss of one's own: called without labels, it has no loss."""
        labels = ("labels", "shift_labels", "sequence_ids")
        logits: Tensor = model(**{key: value for key, value in inputs.items() if key not in labels}).logits
        return logits

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The Trainer's, if gradients will be averaged over the ranks.

        Raises:
            ValueError: a model that data parallelism does not wrap; one that was evaluated first is left so.
        """
        kind = self.accelerator.distributed_type.value
        wrappers = (DistributedDataParallel, FSDPModule, FullyShardedDataParallel)
        plain = not isinstance(getattr(model, "_orig_mod", model), wrappers)
        if self._size() > 1 and (kind.startswith("MULTI_") or kind == "FSDP") and plain:
            raise ValueError(
                "the model is not wrapped for data parallelism, so gradients would not be averaged over ranks. The "
                "Trainer leaves out the wrapper where the model was evaluated before train(): evaluate after it, or "
                "with another Trainer."
            )
        if getattr(self, "loss_is_scaled_for_ga", None) is False:
            # Versions of transformers without this mark divide a loss by the micro-batches where there is no number.
            num_items_in_batch = None
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss; in evaluation too it is weighted by labels over the ranks of a sequence."""
        if self._size() > 1 and num_items_in_batch is None:
            ranks = self._ranks()
            labels = (inputs["shift_labels"] != IGNORED).sum()
            dist.all_reduce(labels, group=ranks.group)
            # The caller averages over ranks, equally, and the Trainer multiplies by their number: what those that
            # share a sequence add up to is sum / labels.
            num_items_in_batch = labels * self.accelerator.num_processes / ranks.size
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The loss of a batch, without logits, which would be the rank's rows."""
        if self._size() == 1:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        context = inputs.get("context")
        if isinstance(context, PlannedContext):
            inputs = {**inputs, "context": context.join(self._ranks().group, device=self.args.device)}
        return inputs

    def _size(self) -> int:
        collator = self.data_collator
        if not isinstance(collator, DataCollatorForFlashMask):
            raise ValueError(
                "ContextParallelTrainerMixin needs data_collator=DataCollatorForFlashMask(context_parallel_size=...), "
                f"got {type(collator).__name__}."
            )
        return collator.context_parallel_size

    def _ranks(self) -> Ranks:
        """The groups of this run; made at the first call, by all ranks together, where DeepSpeed did not make them."""
        size = self._size()
        section: Any = getattr(getattr(self, "model_wrapped", None), "flashmask", None)
        made: Ranks | None = getattr(section, "ranks", None)
        if made is not None and made.size != size:
            raise ValueError(
                f"the DeepSpeed config says flashmask.context_parallel_size={made.size}, but the collator was made "
                f"with context_parallel_size={size}. Give both the same number."
            )
        if made is not None:
            return made
        if self._context_ranks is None:
            self._context_ranks = context_parallel_ranks(size)
        return self._context_ranks

    def _loader(self, dataset: Dataset, batch_size: int, *, shuffle: bool) -> DataLoader:
        self._check()
        ranks = self._ranks()
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                "context parallelism needs a dataset with a length, to give the ranks of a sequence the same samples, "
                f"got {type(dataset).__name__}."
            )
        args = self.args
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset,
            num_replicas=ranks.data_size,
            rank=ranks.data_rank,
            shuffle=shuffle,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        return _EpochLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            drop_last=args.dataloader_drop_last,
        )

    def _check(self) -> None:
        """Refuse what would make the loss of a sharded batch wrong."""
        size, collator = self._size(), self.data_collator
        assert isinstance(collator, DataCollatorForFlashMask)
        expected = self.args.process_index % size
        reasons = {
            f"this is rank {expected} of its sequence's {size}, but the collator was made with context_parallel_rank="
            f"{collator.context_parallel_rank}. Leave it out": collator.context_parallel_rank != expected,
            "average_tokens_across_devices=False weighs ranks equally. Set it to True": (
                not self.args.average_tokens_across_devices
            ),
            "label_smoothing_factor shifts labels that are shifted already. Set it to 0": (
                self.args.label_smoothing_factor != 0
            ),
            "compute_loss_func does not see that labels are shifted already. Override compute_loss instead": (
                self.compute_loss_func is not None
            ),
            "the model takes no num_items_in_batch, so its loss is a mean of the rank's labels. Give its forward "
            "**kwargs that reach its loss": (
                not self.model_accepts_loss_kwargs and getattr(self, "loss_is_scaled_for_ga", None) is not False
            ),
        }
        for reason, wrong in reasons.items():
            if wrong:
                raise ValueError(f"with context_parallel_size={size}: {reason}.")


class _EpochLoader(DataLoader):
    """A loader that the Trainer can tell the epoch, which decides the order."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.sampler, DistributedSampler)
        self.sampler.set_epoch(epoch)
