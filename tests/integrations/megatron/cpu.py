"""Runs Megatron-Core 0.16 on a CPU with gloo: `with megatron_on_cpu(): ...`. For tests only.

What Megatron's local path (no TransformerEngine, no Apex) asks of CUDA is of four kinds, each answered here:
`torch.cuda.current_device()` as a device; `device="cuda"`, `.cuda()` and pinned memory; the random states of CUDA; and
comparisons with the names of CUDA tensor types. Everything is put back at the end. Does nothing where there is a GPU.
"""

import contextlib
import logging
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


def _is_cuda(value):
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")) or type(kwargs.get("device")) is int:
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if function is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(x) else x for x in args)
        if function is torch.Tensor.backward:
            # A mode is off within its own handler, but recomputation runs Python during the backward.
            with self:
                return torch.autograd.backward(
                    args[0], *args[1:], **{_GRADIENT.get(k, k): v for k, v in kwargs.items()}
                )
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(result, str) and not result.startswith("torch.cuda"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


_GRADIENT = {"gradient": "grad_tensors"}


@contextlib.contextmanager
def megatron_on_cpu():
    if torch.cuda.is_available():
        yield
        return
    # All of Megatron before anything is patched: torch.compile, a decorator there, remembers the functions it meets.
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention

    def nothing(*args, **kwargs):
        return None

    def get_rng_state(*args, **kwargs):
        return torch.get_rng_state()

    cuda = {
        "current_device": lambda: torch.device("cpu"),
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "manual_seed": torch.manual_seed,
        "get_rng_state": get_rng_state,
    }
    # Megatron warns that the CPU's random state changed, which here is the state that it means to change.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        for name, replacement in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        stack.enter_context(mock.patch.object(torch.cuda.random, "get_rng_state", get_rng_state))
        stack.enter_context(
            mock.patch.object(random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
        )
        # Without TransformerEngine this module has mocks of its classes, and believes that it has the classes.
        stack.enter_context(mock.patch.object(multi_latent_attention, "HAVE_TE", False))
        # jit_fuser is torch.compile: compiling takes longer than every test here.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_CudaMeansCpu())
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
