"""Runs Megatron-Core 0.16 on a CPU with gloo: `with megatron_on_cpu(): ...`. For tests only.

What Megatron's local path (no TransformerEngine, no Apex) asks of CUDA is of four kinds, each answered here:
`torch.cuda.current_device()` as a device; `device="cuda"`, `.cuda()` and pinned memory; the random states of CUDA; and
comparisons with the names of CUDA tensor types. Without these two libraries its distributed optimizer runs torch's
Adam, whose checkpoints it cannot load, which is mended here too. Everything is put back at the end. Does nothing where
there is a GPU.
"""

import contextlib
import functools
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


def _with_original(optimizer, mended, original, *args):
    return mended(original, optimizer, *args)


def _state_dict(original, optimizer):
    """The distributed optimizer's, also before its first step, when torch's Adam has no state that could be asked for
    the number of steps: what a step without gradients makes is overwritten by the checkpoint, weights included."""
    if not optimizer.optimizer.state:
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.optimizer.step()
        optimizer.optimizer.zero_grad()
    return original(optimizer)


def _load_state_dict(original, optimizer, state_dict):
    """The distributed optimizer's, which gives all parameters one count of steps, that each of them would advance."""
    original(optimizer, state_dict)
    for state in optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()


def _set_states(original, optimizer, parameter, tensors):
    """The distributed optimizer's, which leaves the count of steps out of what it loads and then asks for it."""
    original(optimizer, parameter, {**optimizer._get_main_param_and_optimizer_states(parameter), **tensors})


@contextlib.contextmanager
def megatron_on_cpu():
    if torch.cuda.is_available():
        yield
        return
    # All of Megatron before anything is patched: torch.compile, a decorator there, remembers the functions it meets.
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    from megatron.core import parallel_state
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
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
        for name, mended in (
            ("state_dict", _state_dict),
            ("load_state_dict", _load_state_dict),
            ("_set_main_param_and_optimizer_states", _set_states),
        ):
            mended = functools.partialmethod(_with_original, mended, getattr(DistributedOptimizer, name))
            stack.enter_context(mock.patch.object(DistributedOptimizer, name, mended))
        # jit_fuser is torch.compile: compiling takes longer than every test here.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_CudaMeansCpu())
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
