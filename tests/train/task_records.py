"""Records with prompts and answers, as jsonl for the code under test, and as plain token lists for the oracles."""

import json

BOS, EOS = 256, 257

SFT = [
    {"prompt": "copy: a", "completion": "aaa"},
    {"prompt": "", "completion": "no prompt at all"},
    {"prompt": "a longer prompt, ", "completion": "b"},
    {"prompt": "copy: cd", "completion": "cdcdcd"},
]
DPO = [
    {"prompt": "what?", "chosen": "that", "rejected": "this one"},
    {"prompt": "a longer question, ", "chosen": "a longer answer", "rejected": "no"},
    {"prompt": "x", "chosen": "y", "rejected": "z"},
]
REWARD = [
    {
        "prompt": "rank these six",
        "responses": ["a", "bb", "ccc", "dd", "e", "ffff"],
        "scores": [3, 1, 4, 1, 5, 2.5],
    },
    {"prompt": "two", "responses": ["no", "yes"], "order": [1, 0]},
    {"prompt": "pair ", "chosen": "good", "rejected": "bad!", "margin": 0.25},
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def byte_tokens(prompt, answer):
    """Tokens of one answer alone: the shared ones, and its own."""
    return [BOS, *prompt.encode()], [*answer.encode(), EOS]
