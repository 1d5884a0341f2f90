"""A causal LM without its weights: parameters on the meta device, buffers real.

Why not `with torch.device("meta")`: it also drops the values of the buffers that no file holds (rotary frequencies, causal
masks, alibi slopes), and a model that runs on uninitialised rotary tables gives no error, only a wrong loss.

1. The model is built by transformers itself, on the CPU. Each parameter becomes a meta one in the moment it is registered
   (torch's own registration hook), so at most one module's weights have an address at any time, and nothing touches their pages.
2. A parameter registered twice becomes one meta parameter twice: ties made in a constructor survive. Ties that transformers
   makes later connect meta parameters already.
3. Initialisation runs as it does in any model: on buffers it writes their real values. Draws for meta parameters are skipped, because
   torch spends 0.3 ms on each.
4. Parameters that the model wants in fp32 (`_keep_in_fp32_modules`, for fp16; `_keep_in_fp32_modules_strict`, for bf16 too)
   are declared fp32, as `from_pretrained` would load them.
5. A model that exists already is given another dtype with its buffers: those that it would have in another one, had it been built
   in that dtype (XGLM's sinusoids, MiniMax's slopes; not rotary frequencies, which are fp32 always), are cast to it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from overspill.errors import UnsupportedModelError

_DRAWS = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"})
"""Names that these draws have as methods of a tensor and in `torch.nn.init`."""


def build_meta_model(config: PreTrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM of `config` with every parameter on the meta device and every buffer real, on the CPU.

    Sets `config.dtype` to `dtype` (as transformers does) and changes nothing else of it. Code from a model's repository is never run.

    Args:
        dtype: of the parameters, but for those that the model keeps in fp32.

    Raises:
        UnsupportedModelError: transformers has no causal LM for this configuration, or cannot build the one it describes.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(
            f"a configuration of model_type {config.model_type!r} is of no causal language model of transformers; give one of a "
            "decoder-only model (AutoModelForCausalLM)"
        )
    with _parameters_become_meta(), torch.random.fork_rng(devices=[]), _NoDrawsOnMeta():
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        except Exception as error:  # sizes that cannot be, names that transformers has not: all of it stands in the configuration
            raise UnsupportedModelError(
                f"transformers cannot build the {config.model_type} model that the configuration describes: {type(error).__name__}: "
                f"{error}; look at config.json"
            ) from error
    _declare_fp32_parameters(model, dtype)
    return model


def swap_parameters_for_meta(model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
    """Put a meta parameter of the same shape and trainability where each parameter of `model` was; ties stay ties.

    Args:
        dtype: of the new parameters, but for those that the model keeps in fp32 (rule 4); buffers are cast as rule 5 says, and
            `config.dtype` is set. None: each one's own, and buffers stay.
    """
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and (parameter.device.type != "meta" or dtype is not None):
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = _as_meta(parameter, dtype if parameter.is_floating_point() else None)
                module._parameters[name] = replaced[id(parameter)]
    if dtype is not None:
        assert isinstance(model, PreTrainedModel)
        model.config.dtype = dtype
        _declare_fp32_parameters(model, dtype)
        _cast_buffers(model, dtype)


def _as_meta(parameter: nn.Parameter, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(device="meta", dtype=dtype), requires_grad=parameter.requires_grad)


def _cast_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rule 5, by the names of a second model that has only buffers."""
    own = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if buffer.is_floating_point()}
    if not own:
        return
    with _parameters_become_meta(), torch.random.fork_rng(devices=[]), _NoDrawsOnMeta():
        built = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    wanted = {name: buffer.dtype for name, buffer in built.named_buffers(remove_duplicate=False)}
    cast: dict[int, Tensor] = {}
    for name, buffer in own.items():
        if wanted.get(name, buffer.dtype) != buffer.dtype:
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = cast.setdefault(id(buffer), buffer.to(wanted[name]))


class _NoDrawsOnMeta(TorchFunctionMode):
    """Rule 3."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                return tensor
        return func(*args, **kwargs)


@contextmanager
def _parameters_become_meta() -> Iterator[None]:
    """Rules 1 and 2, for every module built inside."""
    known = WeakIdKeyDictionary()

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.device.type == "meta":
            return None
        if parameter not in known:
            known[parameter] = _as_meta(parameter)
        return known[parameter]

    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]  # torch documents the return value
    try:
        yield
    finally:
        handle.remove()


def _declare_fp32_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rule 4: transformers reads these lists as regular expressions in which `*` stands for anything."""
    patterns: set[str] = set()
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= set(model._keep_in_fp32_modules_strict or ())
    if not patterns:
        return
    wanted = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)))
    replaced: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and wanted.search(f"{prefix}.{name}" if prefix else name):
                replaced.setdefault(id(parameter), _as_meta(parameter, torch.float32))
                module._parameters[name] = replaced[id(parameter)]
