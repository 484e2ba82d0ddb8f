"""What every engine does for the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fm_longctx.data import Batch
from fm_longctx.train.engines.world import World
from fm_longctx.train.step import StepResult


class Engine(ABC):
    """A model spread over the ranks, with its optimizer: what the loop trains.

        engine = make_engine(config, start(config))
        engine.set_lr(lr)
        result = engine.gradients(batches)      # forward and backward; the weights have not moved
        engine.update()                         # clip and step; or engine.discard(), as if the batches had not been

    Every method is a collective: every rank calls it, at the same place.
    """

    name: ClassVar[str]
    """As in `parallel.engine`."""
    world: World
    """This process among the ranks."""
    hf_config: Any
    """The Hugging Face config of the model."""
    num_parameters: int
    """Of the whole model, over all ranks."""

    @abstractmethod
    def gradients(self, batches: Sequence[Batch]) -> StepResult:
        """The loss and the gradient of this rank's micro-batches. Exactly one of `update` and `discard` has to follow.

        Every label of the step weighs the same, whatever rank and micro-batch it is in: the labels are counted over all
        of them, each local sum is divided by that count, and what the engine averages over is made up for.

        Raises:
            TrainingError: there is no label, on any rank.
        """

    @abstractmethod
    def update(self) -> None:
        """Scale the gradients down to `optimizer.clip_norm`, step the optimizer and clear them."""

    @abstractmethod
    def discard(self) -> None:
        """Clear the gradients; weights and optimizer stay as they were."""

    @abstractmethod
    def token_losses(self, batch: Batch) -> Tensor:
        """The loss of each of this rank's labels, float32 `[B, T]` on the device, 0 elsewhere. No gradient."""

    @abstractmethod
    def set_lr(self, lr: float) -> None:
        """The learning rate of the next update."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer as what `torch.distributed.checkpoint` writes and reads in place, on any ranks.

        Empty for engines that write their own files (`save`).
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict` that was filled by `torch.distributed.checkpoint`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what is not in `state_dict` as files of the engine's own, under an existing folder."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: it is not there, or of ranks laid out otherwise where the engine cannot convert it.
        """

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight under its Hugging Face name, whole, on the CPU of rank 0 (elsewhere empty); one at a time."""
