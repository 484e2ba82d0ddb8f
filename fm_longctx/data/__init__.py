"""From text to batches: documents, packing into sequences, masks and plans, resumable loading."""

from fm_longctx.data.loader import Batch, Loader
from fm_longctx.data.packing import IGNORED, PackedSequence, PackedStream
from fm_longctx.data.sources import TextFiles
from fm_longctx.data.tokenizer import ByteTokenizer

__all__ = ["IGNORED", "Batch", "ByteTokenizer", "Loader", "PackedSequence", "PackedStream", "TextFiles"]
