"""DeepSpeed: a "flashmask" section in its config spreads each sequence over ranks, under any mask and ZeRO stage.

    {"zero_optimization": {"stage": 3}, "flashmask": {"context_parallel_size": 4}, ...}

    from fm_longctx.integrations import deepspeed as flashmask

    engine, *_ = flashmask.initialize(model=model, config="ds_config.json")
    loader = DataLoader(dataset, collate_fn=engine.flashmask.collator(), sampler=engine.flashmask.sampler(dataset))
    for batches in engine.flashmask.steps(loader):
        labels = engine.flashmask.num_items(batches)
        for batch in batches:
            loss = engine(**engine.flashmask.prepare(batch), num_items_in_batch=labels).loss
            engine.backward(loss)
            engine.step()

DeepSpeed is never told that sequences are sharded: to it every rank is a data rank, over which it averages gradients at
every ZeRO stage alike, and the loss is scaled so that this average is exact. Its own sequence parallelism (an mpu)
scales gradients differently from stage to stage.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from fm_longctx.context_parallel.assign import STRATEGIES
from fm_longctx.data import IGNORED
from fm_longctx.integrations.groups import Ranks, context_parallel_ranks
from fm_longctx.integrations.transformers import NAME, DataCollatorForFlashMask, register
from fm_longctx.integrations.transformers.collator import PlannedContext

SECTION = "flashmask"
"""The key of our section in a DeepSpeed config."""

_TESTED = "0.19"


@dataclass(frozen=True, kw_only=True)
class FlashMaskSection:
    """The section's keys.

    Raises:
        ValueError: unknown keys, with the nearest known one, or values out of range.
    """

    context_parallel_size: int = 1
    """Consecutive ranks that share each sequence."""
    strategy: str = "balanced"
    """How rows are dealt to ranks, as in `ShardPlan.build`: "balanced", "zigzag" or "contiguous"."""
    chunk_size: int | None = None
    """Positions in a chunk, as in `ShardPlan.build`; chosen by length and ranks if null."""
    num_stages: int | None = None
    """Stages of the exchange, as in `ShardPlan.build`."""

    def __post_init__(self) -> None:
        for name in ("context_parallel_size", "chunk_size", "num_stages"):
            value = getattr(self, name)
            optional = name != "context_parallel_size"
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                also = " or null" if optional else ""
                raise ValueError(f"{SECTION}.{name} must be an integer >= 1{also}, got {value!r}.")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"{SECTION}.strategy must be one of {list(STRATEGIES)}, got {self.strategy!r}.")

    @classmethod
    def parse(cls, section: Any) -> FlashMaskSection:
        """From the config's mapping."""
        if not isinstance(section, Mapping):
            raise ValueError(f'"{SECTION}" must be a mapping of options, got {section!r}.')
        known = [field.name for field in fields(cls)]
        for key in section:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"{SECTION}.{key} is not known.{hint} Known keys: {', '.join(known)}.")
        return cls(**section)


class FlashMaskRun:
    """`engine.flashmask`: this rank's place, and what a training loop needs to feed the engine rightly."""

    def __init__(self, section: FlashMaskSection, ranks: Ranks, engine: Any) -> None:
        self.section, self.ranks = section, ranks
        self._engine = engine

    def collator(self, **options: Any) -> DataCollatorForFlashMask:
        """A collator that cuts out this rank's part; options as of `DataCollatorForFlashMask`."""
        own = asdict(self.section)
        return DataCollatorForFlashMask(context_parallel_rank=self.ranks.rank, **own, **options)

    def sampler(self, dataset: Dataset, **options: Any) -> DistributedSampler:
        """The same samples for the ranks that share sequences; options as of `DistributedSampler`."""
        return DistributedSampler(dataset, num_replicas=self.ranks.data_size, rank=self.ranks.data_rank, **options)

    def steps(self, loader: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """The micro-batches of each optimizer step; a last incomplete step is left out."""
        batches: list[dict[str, Any]] = []
        for batch in loader:
            batches.append(batch)
            if len(batches) == self._engine.gradient_accumulation_steps():
                yield batches
                batches = []

    def num_items(self, batches: Sequence[Mapping[str, Any]]) -> Tensor:
        """What to divide the sum of a rank's token losses by, in every micro-batch of a step; a scalar on the device.

        The step's labels over all ranks and micro-batches, over (ranks x micro-batches), since DeepSpeed averages
        over both: `F.cross_entropy(..., reduction="sum") / num_items`, or `num_items_in_batch=` of a Hugging Face
        model. Every label then weighs the same. The mean of the losses over ranks and micro-batches is the step's
        loss. A collective: every rank calls it.
        """
        counts = [self._labels(batch) for batch in batches]
        steps = self._engine.gradient_accumulation_steps()
        if len(counts) != steps:
            raise ValueError(
                f"num_items needs all micro-batches of a step: the engine accumulates {steps}, got {len(counts)}."
            )
        total = torch.stack(counts).sum().to(self._engine.device, torch.float32)
        dist.all_reduce(total)
        return total / (dist.get_world_size() * steps)

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch on the device, its planned context joined to the group. All ranks of a sequence call it."""
        device = self._engine.device
        ready: dict[str, Any] = {}
        for key, value in batch.items():
            if isinstance(value, PlannedContext):
                value = value.join(self.ranks.group, device=device)
            elif isinstance(value, Tensor):
                value = value.to(device, non_blocking=True)
            ready[key] = value
        return ready

    def _labels(self, batch: Mapping[str, Any]) -> Tensor:
        if "shift_labels" in batch:
            return (batch["shift_labels"] != IGNORED).sum()
        # The first token of a row is predicted by none.
        return (batch["labels"][..., 1:] != IGNORED).sum()


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """`deepspeed.initialize` with a "flashmask" section in its config; same arguments, same result.

    `engine.flashmask` is a `FlashMaskRun`. A Hugging Face model is switched to `attn_implementation="fm_longctx"`;
    other models call the attention themselves. `train_batch_size` counts sequences, each of them once.

    Raises:
        ValueError: DeepSpeed is missing, or the section is missing, has unknown keys, or conflicts with other settings.
    """
    library = _library()
    return _initialize(_original or library.initialize, args, kwargs, required=True)


_original: Callable[..., Any] | None = None


def install() -> None:
    """Make `deepspeed.initialize` itself honour the section, and so the Hugging Face Trainer and Accelerate.

    Call it before the engine is made, on every rank. A config without the section goes through unchanged. Calling it
    again changes nothing; `uninstall` puts the original back. Code that took `initialize` out of deepspeed before keeps
    the original.
    """
    global _original
    library = _library()
    if _original is not None:
        return
    original = library.initialize

    def initialize_with_section(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return _initialize(original, args, kwargs, required=False)

    initialize_with_section.__doc__ = original.__doc__
    initialize_with_section.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    _original, library.initialize = original, initialize_with_section


def uninstall() -> None:
    """Undo `install`."""
    global _original
    if _original is not None:
        _library().initialize, _original = _original, None


def _library() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "the DeepSpeed integration needs deepspeed. Install it with: pip install 'fm_longctx[deepspeed]'."
        ) from error
    if not deepspeed.__version__.startswith(f"{_TESTED}."):
        warnings.warn(f"fm_longctx was tested with deepspeed {_TESTED}, not {deepspeed.__version__}.", stacklevel=3)
    return deepspeed


def _initialize(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, required: bool
) -> tuple[Any, ...]:
    call: dict[str, Any] = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
    config = _config(call)
    if SECTION not in config:
        if required:
            raise ValueError(
                f'the DeepSpeed config has no "{SECTION}" section. Add "{SECTION}": {{"context_parallel_size": 1}} or '
                "call deepspeed.initialize."
            )
        return original(*args, **kwargs)
    section = FlashMaskSection.parse(config[SECTION])
    if section.context_parallel_size > 1:
        _refuse_conflicts(call, config)
    _library().init_distributed()
    ranks = context_parallel_ranks(section.context_parallel_size)
    if section.context_parallel_size > 1:
        config = _count_each_sequence_once(config, section.context_parallel_size)
    model: Any = call.get("model")
    if hasattr(model, "set_attn_implementation"):
        register()
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
    for name in ("config", "config_params"):
        call.pop(name, None)
    result = original(**_without_config(call), config=config)
    result[0].flashmask = FlashMaskRun(section, ranks, result[0])
    return tuple(result)


def _config(call: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a call, wherever DeepSpeed looks for it; a shallow copy."""
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    given = [call.get("config"), call.get("config_params"), getattr(call.get("args"), "deepspeed_config", None)]
    config = next((one for one in given if one is not None), None)
    if config is None:
        return {}
    return dict(load_ds_config(config))


def _without_config(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the config taken from `args` too: DeepSpeed refuses to be given two."""
    arguments: Any = call.get("args")
    if getattr(arguments, "deepspeed_config", None) is not None:
        arguments = copy.copy(arguments)
        arguments.deepspeed_config = None
        call = {**call, "args": arguments}
    return call


def _refuse_conflicts(call: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """What would scale gradients, or cut sequences, a second time."""
    from deepspeed.pipe import PipelineModule

    def above_one(*path: str) -> bool:
        value: Any = config
        for key in path:
            value = value.get(key, {}) if isinstance(value, Mapping) else {}
        return isinstance(value, int) and value > 1

    reasons = {
        "an mpu: DeepSpeed would average gradients over its data-parallel group, scaled differently at each ZeRO "
        "stage. Leave mpu out; the section makes the groups": call.get("mpu") is not None,
        "mesh_param: it sets up DeepSpeed's own sequence parallelism. Leave it out": call.get("mesh_param") is not None,
        "sequence_parallel_size: DeepSpeed's own sequence parallelism would cut each sequence a second time. Keep one "
        "of the two": above_one("sequence_parallel_size"),
        "tensor_parallel.autotp_size: its ranks would be counted as ranks of the sequence. Set it to 1": above_one(
            "tensor_parallel", "autotp_size"
        ),
        'gradient_allreduce_op "sum": the loss is scaled for an average. Leave it out': (
            config.get("gradient_allreduce_op", "mean") == "sum"
        ),
        "a PipelineModule: its stages do not hand on the mask. Train without pipeline stages": isinstance(
            call.get("model"), PipelineModule
        ),
    }
    for reason, present in reasons.items():
        if present:
            raise ValueError(f"{SECTION}.context_parallel_size > 1 cannot be combined with {reason}.")


def _count_each_sequence_once(config: dict[str, Any], size: int) -> dict[str, Any]:
    """DeepSpeed multiplies micro-batches by ranks, of which `size` share a sequence: give it that many more."""
    batch, micro, steps = (
        config.get(key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if not isinstance(batch, int):
        return config
    # The Hugging Face Trainer and Accelerate fill in all three, counting ranks as DeepSpeed does.
    counted = isinstance(micro, int) and isinstance(steps, int) and batch == micro * steps * dist.get_world_size()
    return config if counted else {**config, "train_batch_size": batch * size}
