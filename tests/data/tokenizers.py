"""A small Hugging Face tokenizer, made here: nothing is downloaded."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<unk>")


def save(folder, *, bos="<s>", eos="</s>", max_length=None, special=SPECIAL):
    """Words and their parts, a few special tokens; optionally one that says it truncates and pads."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat and the hat, the rat and the bat"] * 4, trainer)
    if max_length is not None:
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(length=max_length)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>"
    ).save_pretrained(str(folder))
    return folder
