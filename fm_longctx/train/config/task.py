"""The `task` and `lora` sections."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from fm_longctx.train.config.check import above_zero, at_least

if TYPE_CHECKING:
    from fm_longctx.train.config import Config

# The tasks that read a field; it is refused, unless it has its default, under any other.
_READ_BY = {
    "assistant_only": ("sft",),
    "beta": ("dpo",),
    "loss": ("dpo",),
    "label_smoothing": ("dpo",),
    "reference": ("dpo",),
    "center_rewards_coefficient": ("reward",),
    "too_long": ("sft", "dpo", "reward"),
}


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is learned, from which records. `task: dpo` is short for `task: {kind: dpo}`."""

    kind: Literal["pretrain", "sft", "dpo", "reward"] = "pretrain"
    """pretrain: the next token of documents. sft: completions of prompts. dpo: to prefer the chosen answer to the
    rejected one. reward: a score for an answer, from which of several is better."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """A record that does not fit into data.sequence_length: stop and name it, or leave them out and say how many."""
    assistant_only: bool = False
    """sft on `messages`: learn the assistant's turns only. The chat template must mark them ({% generation %})."""
    beta: float = 0.1
    """dpo: how strongly the policy is held to the reference; smaller lets it move further."""
    loss: Literal["sigmoid", "robust"] = "sigmoid"
    """dpo: sigmoid, smoothed if label_smoothing says so; or robust, which label_smoothing leaves unbiased."""
    label_smoothing: float = 0.0
    """dpo: the probability that chosen and rejected were swapped; at least 0 and below 0.5."""
    reference: Literal["model", "records"] = "model"
    """dpo: the reference is the model as it was at the start (with lora the same weights without adapters, otherwise
    a second, frozen copy); or its log-probabilities are in the records (ref_chosen_logps, ref_rejected_logps)."""
    center_rewards_coefficient: float = 0.0
    """reward: weight of the mean squared sum of a pair's two scores, which holds scores near 0. 0 is none."""

    def __post_init__(self) -> None:
        for field in fields(self):
            readers = _READ_BY.get(field.name)
            value = getattr(self, field.name)
            if readers is not None and self.kind not in readers and value != field.default:
                raise ValueError(
                    f"task.{field.name} is read only by task.kind: {' or '.join(readers)}, but task.kind is "
                    f"{self.kind}. Leave it out."
                )
        above_zero("task", beta=self.beta)
        at_least("task", 0, center_rewards_coefficient=self.center_rewards_coefficient)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"task.label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}.")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (peft): only they, and a reward model's score head, are trained, saved and exported."""

    r: int | None = None
    """Rank of the adapters. None: none, the whole model trains."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / r."""
    dropout: float = 0.0
    """Probability that an input of an adapter is dropped, in training."""
    target_modules: str = "all-linear"
    """Names of the modules that get adapters, with commas between them (q_proj,v_proj); or all-linear, all projections
    but the output's."""

    def __post_init__(self) -> None:
        at_least("lora", 1, r=self.r)
        above_zero("lora", alpha=self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be at least 0 and below 1, got {self.dropout}.")
        if not self.targets:
            raise ValueError(
                f"lora.target_modules must be all-linear or names such as q_proj,v_proj, got {self.target_modules!r}."
            )
        given: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = [f.name for f in fields(self) if f.name != "r" and given[f.name] != f.default]
        if self.r is None and changed:
            raise ValueError(f"lora.{changed[0]} is set, but there are no adapters. Set lora.r, such as 16.")

    @property
    def targets(self) -> str | list[str]:
        """`target_modules` as peft takes it: a word for all, or a list of names."""
        names = [name.strip() for name in self.target_modules.split(",") if name.strip()]
        return "all-linear" if names == ["all-linear"] else names


def check_task(config: Config) -> None:
    """Raise a ValueError unless the task, the data and the engine go together."""
    task, parallel = config.task, config.parallel
    if task.kind != "pretrain" and config.data.source != "jsonl":
        raise ValueError(
            f"task.kind: {task.kind} reads records: set data.source to jsonl and data.path to a file of them, got "
            f"data.source: {config.data.source}."
        )
    default = type(config.data)()
    for name in ("text_field", "add_bos", "add_eos", "packing", "window"):
        value = getattr(config.data, name)
        if task.kind != "pretrain" and value != getattr(default, name):
            raise ValueError(
                f"data.{name}={value} is for documents, but task.kind: {task.kind} reads records, which are never cut. "
                "Leave it out."
            )
    if task.kind != "pretrain" and config.eval.every is not None:
        raise ValueError(
            f"eval.every is for task.kind: pretrain, whose loss has positions in a document, got {task.kind}. Leave it "
            "out."
        )
    if task.kind == "reward" and config.lora.r is None and config.checkpoint.export:
        raise ValueError(
            "checkpoint.export writes a language model, but task.kind: reward trains a score head in its place. Set "
            "lora.r, whose adapters and head are exported, or leave it out."
        )
    beyond = "lora" if config.lora.r is not None else f"task.kind: {task.kind}"
    if config.lora.r is not None or task.kind in ("dpo", "reward"):
        if parallel.engine != "fsdp":
            raise ValueError(f"{beyond} needs parallel.engine: fsdp, got {parallel.engine}.")
        if parallel.tensor != 1:
            raise ValueError(f"{beyond} needs parallel.tensor=1, got {parallel.tensor}. Use parallel.context instead.")
