"""DeepSpeed inside a rank of the pool of test processes, whose process groups come and go."""

from contextlib import contextmanager


@contextmanager
def deepspeed_world():
    """deepspeed, as if just imported: it keeps groups of the last call in module globals."""
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    from fm_longctx.integrations.deepspeed import uninstall

    # It would be compiled at first use, which takes a compiler and half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    kept = {name: value for name, value in vars(groups).items() if name.isupper()}
    kept = {name: value.copy() if isinstance(value, dict) else value for name, value in kept.items()}
    comm.cdb = None
    # It numbers parameters and modules on and on, and compares the numbers between ranks of different pasts.
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][:] = [0]
    try:
        yield deepspeed
    finally:
        uninstall()
        comm.cdb = None
        vars(groups).update(kept, mpu=None, mesh_device=None)
