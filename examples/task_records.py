"""Write toy records for the tasks sft, dpo and reward, as jsonl in TRL's field names.

    python examples/task_records.py dpo examples/records/dpo.jsonl

sft: say a word backwards. dpo: an answer in small letters is chosen, the same in capitals rejected. reward: of two to
six answers the one with more vowels is better. examples/records holds what this script writes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = set("aeiou")


def word(draw: random.Random) -> str:
    return "".join(draw.choices(LETTERS, k=draw.randint(3, 9)))


def sft(draw: random.Random) -> dict[str, object]:
    given = word(draw)
    return {"prompt": f"backwards: {given}\n", "completion": given[::-1]}


def dpo(draw: random.Random) -> dict[str, object]:
    answer = word(draw)
    return {"prompt": f"say {word(draw)}\n", "chosen": answer, "rejected": answer.upper()}


def reward(draw: random.Random) -> dict[str, object]:
    while True:
        responses = [word(draw) for _ in range(draw.randint(2, 6))]
        scores = [sum(letter in VOWELS for letter in response) for response in responses]
        # Somebody has to win.
        if len(set(scores)) > 1:
            return {"prompt": "a word with vowels\n", "responses": responses, "scores": scores}


TASKS: dict[str, Callable[[random.Random], dict[str, object]]] = {"sft": sft, "dpo": dpo, "reward": reward}


def main(task: str, path: str, records: int = 64) -> None:
    draw = random.Random(0)
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(TASKS[task](draw)) + "\n" for _ in range(records)))
    print(f"{records} records in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in TASKS:
        sys.exit(__doc__)
    main(*sys.argv[1:])
