"""From text to batches: documents, packing into sequences, masks and plans, resumable loading."""

from fm_longctx.data.documents import Documents, TokenizedTexts
from fm_longctx.data.hf_datasets import DatasetFeed, DatasetTexts
from fm_longctx.data.jsonl import JsonLines
from fm_longctx.data.loader import Batch, Loader
from fm_longctx.data.packing import PackedStream
from fm_longctx.data.sequence import IGNORED, PackedSequence, Stream, assemble
from fm_longctx.data.sources import TextFiles
from fm_longctx.data.streaming import FeedStream
from fm_longctx.data.token_files import TokenFiles
from fm_longctx.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

__all__ = [
    "IGNORED",
    "Batch",
    "ByteTokenizer",
    "DatasetFeed",
    "DatasetTexts",
    "Documents",
    "FeedStream",
    "HuggingFaceTokenizer",
    "JsonLines",
    "Loader",
    "PackedSequence",
    "PackedStream",
    "Stream",
    "TextFiles",
    "TokenFiles",
    "TokenizedTexts",
    "Tokenizer",
    "assemble",
]
