"""What benchmarks/train.py measures: model shapes, lengths and memory settings, a cell each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from fm_longctx.train.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

SECTIONS = ("speed", "modes", "memory", "longest", "million", "convergence")

Arm = Literal["ours", "flex", "dense", "ours_nearest"]

LLAMA_1B = ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    rope_theta=500000.0,
)
LLAMA_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    tie_word_embeddings=False,
)
SHAPES = {
    "1b": LLAMA_1B,
    # An eighth of the layers and of the vocabulary: the parts' shares of the work stay those of the 8B model.
    "8b_eighth": replace(LLAMA_8B, num_hidden_layers=4, vocab_size=16032),
    "8b": LLAMA_8B,
    "160m": replace(
        LLAMA_1B,
        vocab_size=258,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
    "tiny": ModelConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16, initializer_range=0.1),
}


@dataclass(frozen=True, kw_only=True)
class TrainCell:
    """One model at one length, in one way of keeping activations; every arm runs it."""

    section: str
    shape: str
    n: int
    arms: tuple[Arm, ...]
    checkpointing: Literal["none", "full", "selective"] = "selective"
    offload: bool = False
    mlp_chunk: int | None = None
    mlp_kept: int = 0
    loss_chunk: int = 4096
    compile: bool = False
    precision: Literal["float32", "bfloat16", "bfloat16_stochastic"] = "bfloat16"
    steps: int = 5
    warmup: int = 2
    """Steps before those that count: they compile, and fill the allocator."""
    longest_document: int = 131072

    @property
    def key(self) -> str:
        parts = [self.section, self.shape, f"n{self.n}", self.checkpointing]
        parts += [name for name, on in (("offload", self.offload), ("compile", self.compile)) if on]
        parts += [f"kept{self.mlp_kept}"] if self.mlp_kept else []
        parts += [f"mlp{self.mlp_chunk}"] if self.mlp_chunk is not None else []
        parts += [f"loss{self.loss_chunk}"] if self.loss_chunk != 4096 else []
        return "/".join([*parts, self.precision])

    @property
    def identity(self) -> dict[str, Any]:
        names = ("section", "shape", "n", "checkpointing", "offload", "mlp_chunk", "mlp_kept", "loss_chunk")
        names += ("compile", "precision")
        layers = SHAPES[self.shape].num_hidden_layers
        return {"key": self.key, "layers": layers} | {name: getattr(self, name) for name in names}

    def config(self, device: str) -> Config:
        """The launcher's config of the cell."""
        return Config(
            model=SHAPES[self.shape],
            data=DataConfig(sequence_length=self.n),
            optimizer=OptimizerConfig(lr=3e-4 if self.section == "convergence" else 1e-4),
            train=TrainConfig(
                device="cuda" if device == "cuda" else "cpu",
                precision=self.precision,
                activation_checkpointing=self.checkpointing,
                activation_offload=self.offload,
                mlp_chunk=self.mlp_chunk,
                mlp_kept=self.mlp_kept,
                loss_chunk=self.loss_chunk,
                compile=self.compile,
            ),
        )


def cells(section: str, *, smoke: bool = False) -> list[TrainCell]:
    """The cells of a section, in the order in which they are run."""
    if smoke:
        return _smoke(section)
    compared: tuple[Arm, ...] = ("ours", "flex", "dense")
    if section == "speed":
        # Each keeps what fits into 80 GB, at 65536 with a dense mask of 8 GiB too. At 131072 it would be 32 GiB.
        kept_at: list[tuple[str, int, Literal["none", "selective"], int]] = [
            ("8b_eighth", 131072, "selective", 3),
            ("1b", 131072, "selective", 4),
            ("8b_eighth", 65536, "selective", 4),
            ("8b_eighth", 32768, "none", 0),
            ("1b", 32768, "none", 0),
            ("1b", 65536, "selective", 8),
        ]
        return [
            TrainCell(
                section=section,
                shape=shape,
                n=n,
                arms=compared,
                checkpointing=mode,
                mlp_kept=kept,
                compile=True,
                steps=2,
                warmup=1,
            )
            for shape, n, mode, kept in kept_at
        ]
    if section == "modes":
        return [
            TrainCell(
                section=section,
                shape="8b_eighth",
                n=131072,
                arms=("ours",),
                checkpointing=mode,
                compile=compiled,
                mlp_kept=kept,
                loss_chunk=loss_chunk,
                steps=2,
            )
            for mode, compiled, kept, loss_chunk in (
                ("selective", True, 4, 4096),
                ("selective", True, 3, 1024),
                ("selective", True, 0, 4096),
                ("full", True, 0, 4096),
                ("selective", False, 0, 4096),
                ("full", False, 0, 4096),
            )
        ]
    if section == "memory":
        return [
            TrainCell(
                section=section,
                shape=shape,
                n=n,
                arms=("ours",),
                checkpointing=mode,
                offload=offload,
                compile=compiled,
                mlp_kept=kept,
                steps=1,
                warmup=1,
            )
            for n in (131072, 32768)
            for shape in ("1b", "8b_eighth")
            for mode, offload, compiled, kept in (
                ("none", False, False, 0),
                ("full", False, False, 0),
                ("selective", False, False, 0),
                ("full", True, False, 0),
                ("none", False, True, 0),
                ("selective", False, True, 0),
                ("selective", False, True, 2),
            )
        ]
    if section == "longest":
        both: tuple[Arm, ...] = ("ours", "ours_nearest")
        small: dict[str, Any] = {"section": section, "shape": "8b", "arms": both, "steps": 1, "warmup": 1}
        small |= {"mlp_chunk": 8192, "offload": True, "precision": "bfloat16_stochastic"}
        return [
            TrainCell(**small, n=n, checkpointing=mode, compile=True)
            for n, mode in (
                (131072, "full"),
                (131072, "selective"),
                (163840, "full"),
                (196608, "full"),
                (262144, "full"),
            )
        ]
    if section == "million":
        return [
            TrainCell(
                section=section,
                shape="1b",
                n=n,
                arms=("ours",),
                checkpointing="full",
                offload=True,
                mlp_chunk=16384,
                compile=True,
                steps=1,
                warmup=1,
            )
            for n in (1048576, 524288)
        ]
    if section == "convergence":
        return [TrainCell(section=section, shape="160m", n=8192, arms=("ours", "dense"), steps=200, warmup=0)]
    raise ValueError(f"unknown section {section!r}; there are {', '.join(SECTIONS)}.")


def _smoke(section: str) -> list[TrainCell]:
    """Every path of a section on a CPU; no figure worth keeping."""
    shared: dict[str, Any] = {"section": section, "shape": "tiny", "n": 192, "steps": 2, "warmup": 1}
    if section == "speed":
        return [TrainCell(**shared, arms=("ours", "flex", "dense"), precision="float32")]
    if section == "memory":
        return [TrainCell(**shared, arms=("ours",), checkpointing="full", offload=True)]
    if section == "longest":
        arms: tuple[Arm, ...] = ("ours", "ours_nearest")
        return [TrainCell(**shared, arms=arms, offload=True, mlp_chunk=64, precision="bfloat16_stochastic")]
    if section == "convergence":
        return [TrainCell(**shared | {"steps": 3}, arms=("ours", "dense"), precision="float32")]
    if section in SECTIONS:
        return [TrainCell(**shared, arms=("ours",), mlp_chunk=64)]
    raise ValueError(f"unknown section {section!r}; there are {', '.join(SECTIONS)}.")
