"""DeepSpeed inside a rank of the pool of test processes, whose process groups come and go."""

from contextlib import contextmanager


@contextmanager
def deepspeed_world():
    """deepspeed, as if just imported: it keeps groups of the last call in module globals."""
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    from fm_longctx.integrations.deepspeed import uninstall

    # It would be compiled at first use, which takes a compiler and half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    kept = {name: value for name, value in vars(groups).items() if name.isupper()}
    kept = {name: value.copy() if isinstance(value, dict) else value for name, value in kept.items()}
    comm.cdb = None
    try:
        yield deepspeed
    finally:
        uninstall()
        comm.cdb = None
        vars(groups).update(kept, mpu=None, mesh_device=None)
