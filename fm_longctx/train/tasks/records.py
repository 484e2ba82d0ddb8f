"""A line of a task's jsonl file as a token tree: a question and the answers that share it, in TRL's field names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fm_longctx.data import IGNORED
from fm_longctx.data.trees import Node, answers_of, num_rows
from fm_longctx.train.config.task import TaskConfig
from fm_longctx.train.tasks.encoder import Encoder

# Fields that say something to some task. One that the record's own task does not read is refused; others, such as an id
# or a source, are the user's own.
_KNOWN = {
    "text",
    "messages",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "responses",
    "scores",
    "order",
    "margin",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "label",
    "images",
}
_CHAT = ("tools", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line, in tokens."""

    nodes: list[Node]
    """The tree that is packed: the question, then each of its answers. Only the answers are sequences."""
    pairs: tuple[tuple[int, int], ...] = ()
    """(better, worse), indices of answers."""
    margins: tuple[float, ...] = ()
    """By which the better score of each pair should lead."""
    references: tuple[float, ...] = ()
    """The reference's log-probability of each answer, where the record holds them."""

    @property
    def num_answers(self) -> int:
        return sum(node.is_sequence for node in self.nodes)

    @property
    def num_rows(self) -> int:
        """Rows of a packed sequence that it takes."""
        return num_rows(self.nodes)


def parser(config: TaskConfig, encoder: Encoder) -> Callable[[Mapping[str, Any]], Record]:
    """What turns a line's content into a record of this task. It raises a ValueError that says what is wrong."""
    if config.kind == "sft":
        return lambda content: _sft(content, encoder, config.assistant_only)
    if config.kind == "dpo":
        return lambda content: _dpo(content, encoder, config.reference == "records")
    assert config.kind == "reward"
    return lambda content: _reward(content, encoder)


def _sft(content: Mapping[str, Any], encoder: Encoder, assistant_only: bool) -> Record:
    form = _form(content, ("messages",), ("prompt", "completion"))
    if form == ("messages",):
        tokens, assistant = encoder.chat(content["messages"], assistant_only=assistant_only, **_chat_options(content))
        labels = [t if own else IGNORED for t, own in zip(tokens, assistant, strict=True)]
        if all(label == IGNORED for label in labels[1:]):
            raise ValueError("its messages hold no token to learn. With assistant_only it needs an assistant's turn.")
        return Record(nodes=[Node(parent=-1, tokens=tokens, labels=labels)])
    if assistant_only:
        raise ValueError(
            "task.assistant_only is for `messages`; of a prompt and a completion the completion is learned."
        )
    question, (answer,) = _split(content, encoder, content["prompt"], [content["completion"]])
    return Record(nodes=answers_of(question, [answer]))


def _dpo(content: Mapping[str, Any], encoder: Encoder, from_records: bool) -> Record:
    references = ("ref_chosen_logps", "ref_rejected_logps")
    form = _form(content, ("prompt", "chosen", "rejected"), ("chosen", "rejected"), optional=references)
    given = [name for name in references if name in content]
    if from_records and len(given) < len(references):
        raise ValueError(f"task.reference is records, which needs {' and '.join(references)} in each of them.")
    if given and not from_records:
        raise ValueError(f"it has {given[0]}, but task.reference is model. Set it to records, or leave the field out.")
    question, answers = _split(content, encoder, content["prompt"] if "prompt" in form else None, _pair(content))
    values = tuple(_number(content, name) for name in references) if from_records else ()
    return Record(nodes=answers_of(question, answers), pairs=((0, 1),), margins=(0.0,), references=values)


def _reward(content: Mapping[str, Any], encoder: Encoder) -> Record:
    form = _form(
        content,
        ("prompt", "responses", "scores"),
        ("prompt", "responses", "order"),
        ("prompt", "chosen", "rejected"),
        ("chosen", "rejected"),
        optional=("margin",) if "responses" not in content else (),
    )
    if "responses" not in form:
        question, answers = _split(content, encoder, content["prompt"] if "prompt" in form else None, _pair(content))
        margin = _number(content, "margin") if "margin" in content else 0.0
        return Record(nodes=answers_of(question, answers), pairs=((0, 1),), margins=(margin,))
    responses = _list(content, "responses")
    if len(responses) < 2:
        raise ValueError(f"responses must be at least 2, got {len(responses)}.")
    if "scores" in form:
        scores = [float(score) if _is_number(score) else float("nan") for score in _list(content, "scores")]
        if len(scores) != len(responses) or any(score != score for score in scores):
            raise ValueError(
                f"scores must be a number for each of the {len(responses)} responses, got {content['scores']}."
            )
    else:
        order = _list(content, "order")
        if sorted(map(repr, order)) != sorted(map(repr, range(len(responses)))):
            raise ValueError(
                f"order must hold each of 0..{len(responses) - 1} once, the best response first, got {order}."
            )
        scores = [-float(order.index(i)) for i in range(len(responses))]
    numbers = range(len(responses))
    pairs = tuple((i, j) for i in numbers for j in numbers if scores[i] > scores[j])
    if not pairs:
        raise ValueError("all its responses have the same score, so none is better than another.")
    question, answers = _split(content, encoder, content["prompt"], responses)
    return Record(nodes=answers_of(question, answers), pairs=pairs, margins=(0.0,) * len(pairs))


def _form(content: Mapping[str, Any], *forms: tuple[str, ...], optional: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Which of the forms a record has; a ValueError if it is none, or says more than its task reads."""
    known = {key for key in content if key in _KNOWN}
    for form in forms:
        if set(form) <= known <= {*form, *optional}:
            return form
    wanted = "; or ".join(", ".join(form) for form in forms)
    more = f" (and {', '.join(optional)})" if optional else ""
    raise ValueError(f"it has the fields {sorted(content)}, but this task reads {wanted}{more}.")


def _split(
    content: Mapping[str, Any], encoder: Encoder, prompt: Any, answers: Sequence[Any]
) -> tuple[list[int], list[list[int]]]:
    """The shared tokens, and each answer's own.

    Prompt and answer are encoded together, as they will be met. The question is what all of these and the prompt alone
    begin with: where tokens merge across the boundary, the answers begin with the merged ones (as in TRL). Without a
    prompt it is what the answers begin with.
    """
    options = _chat_options(content)

    def encode(part: Any) -> list[int]:
        together = part if prompt is None else _together(prompt, part)
        return encoder.text(together) if isinstance(together, str) else encoder.chat(together, **options)[0]

    whole = [encode(answer) for answer in answers]
    whole = [
        _ended(tokens, encoder.eos) if isinstance(a, str) else tokens for tokens, a in zip(whole, answers, strict=True)
    ]
    starts = list(whole)
    if prompt is not None:
        starts.append(
            encoder.text(prompt) if isinstance(prompt, str) else encoder.chat(prompt, generation=True, **options)[0]
        )
    shared = next(
        (i for i, column in enumerate(zip(*starts, strict=False)) if len(set(column)) > 1), min(map(len, starts))
    )
    own = [tokens[shared:] for tokens in whole]
    if not all(own):
        raise ValueError("an answer has no tokens of its own: it is empty, or another answer begins with all of it.")
    return whole[0][:shared], own


def _together(prompt: Any, answer: Any) -> Any:
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt + answer
    if isinstance(prompt, list) and isinstance(answer, list):
        return [*prompt, *answer]
    raise ValueError(
        "prompt and answers must be all text, or all lists of messages, got "
        f"{type(prompt).__name__} and {type(answer).__name__}."
    )


def _ended(tokens: list[int], eos: int | None) -> list[int]:
    return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]


def _pair(content: Mapping[str, Any]) -> list[Any]:
    return [content["chosen"], content["rejected"]]


def _chat_options(content: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(content.get("chat_template_kwargs") or {})
    if content.get("tools") is not None:
        options["tools"] = content["tools"]
    return options


def _list(content: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(content[key], list):
        raise ValueError(f"{key} must be a list, got {content[key]!r}.")
    return list(content[key])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(content: Mapping[str, Any], key: str) -> float:
    if not _is_number(content[key]):
        raise ValueError(f"{key} must be a number, got {content[key]!r}.")
    return float(content[key])
