"""What an engine cannot do of the other sections: refused by name, before any rank starts."""

from __future__ import annotations

from fm_longctx.train.config.parallel import ParallelConfig
from fm_longctx.train.config.run import TrainConfig

# Values that engines other than fsdp honour.
_PRECISIONS = ("float32", "bfloat16")
_MEGATRON_RECOMPUTES = ("none", "full")


def check_engine(parallel: ParallelConfig, train: TrainConfig) -> None:
    """Raise a ValueError that names the option."""
    engine = parallel.engine
    if engine != "fsdp" and train.precision not in _PRECISIONS:
        raise _unknown(engine, "train.precision", train.precision, _PRECISIONS)
    if engine == "megatron" and train.activation_checkpointing not in _MEGATRON_RECOMPUTES:
        raise _unknown(engine, "train.activation_checkpointing", train.activation_checkpointing, _MEGATRON_RECOMPUTES)
    unknown = ("mlp_chunk", "mlp_kept", "compile")
    for name in unknown if engine == "deepspeed" else (*unknown, "activation_offload"):
        value = getattr(train, name)
        if engine != "fsdp" and value:
            raise ValueError(
                f"parallel.engine: {engine} does not know train.{name}={value}. Leave it out, or set parallel.engine "
                "to fsdp."
            )
    if engine == "deepspeed" and train.precision == "bfloat16" and parallel.zero_stage == 1:
        raise ValueError(
            "parallel.zero_stage=1 with train.precision: bfloat16 is another optimizer inside DeepSpeed, which is not "
            "supported here. Set parallel.zero_stage to 2 or 3."
        )


def _unknown(engine: str, key: str, value: str, allowed: tuple[str, ...]) -> ValueError:
    return ValueError(
        f"parallel.engine: {engine} does not know {key}: {value}. Set it to one of {', '.join(allowed)}, or "
        "parallel.engine to fsdp."
    )
