"""What a collator packs, said anew: every sequence of a feature alone."""

import torch


def paths(feature):
    """The sequences of a feature: (tokens before it, its tokens, which are to be predicted)."""
    if "input_ids" in feature:
        return [([], feature["input_ids"])]
    if "segments" in feature:
        before = {-1: []}
        result = []
        for i, (tokens, parent) in enumerate(zip(feature["segments"], feature["parents"], strict=True)):
            result.append((before[parent], tokens))
            before[i] = before[parent] + tokens
        return result
    if "completion_ids" in feature:
        return [(feature["prompt_ids"], answer) for answer in feature["completion_ids"]]
    return [(feature["prompt_ids"], feature[key]) for key in ("chosen_ids", "rejected_ids")]


def log_probs(model, features):
    """Log-probability of each sequence given what comes before it, each in a call of its own; and all their labels."""
    sums, labels = [], 0
    for before, tokens in (path for feature in features for path in paths(feature)):
        if len(before) + len(tokens) < 2:
            sums.append(torch.zeros(()))
            continue
        ids = torch.tensor([before + tokens])
        logits = model(ids, use_cache=False).logits[0, :-1]
        chosen = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0][max(0, len(before) - 1) :]
        sums.append(chosen.sum())
        labels += len(chosen)
    return torch.stack(sums), labels


def mean_loss(model, features):
    sums, labels = log_probs(model, features)
    return -sums.sum() / labels
