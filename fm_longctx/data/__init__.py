"""From text to batches: documents, packing into sequences, masks and plans, resumable loading."""

from fm_longctx.data.jsonl import JsonLines
from fm_longctx.data.loader import Batch, Loader
from fm_longctx.data.packing import PackedStream
from fm_longctx.data.sequence import IGNORED, PackedSequence, Stream, assemble
from fm_longctx.data.sources import TextFiles
from fm_longctx.data.tokenizer import ByteTokenizer

__all__ = [
    "IGNORED",
    "Batch",
    "ByteTokenizer",
    "JsonLines",
    "Loader",
    "PackedSequence",
    "PackedStream",
    "Stream",
    "TextFiles",
    "assemble",
]
