"""What may be given as a model object, and the configuration it is saved with.

A causal LM of transformers that is in memory, whole and not yet taken, can be streamed; everything else is refused here in a
sentence, before anything of it is changed:

1. Wrappers (PEFT, DataParallel, any other module) are no models of transformers: what they add around the model would be lost.
2. Adapters and quantized weights inside a model are not parameters that an optimizer step can stream.
3. A model taken by a session has stand-ins for blocks and no weights; so has one whose session could not be opened.
4. A model whose weights were left on drives or on the meta device (`device_map`) has nothing to train.
"""

from __future__ import annotations

import copy
from typing import NoReturn

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from overspill.errors import UnsupportedModelError
from overspill.huggingface.stand_ins import StandIn


def validate_model_object(model: object) -> None:
    """Refuse what cannot be taken over as a model with its weights (rules 1 to 4); changes nothing.

    Raises:
        UnsupportedModelError: with what is wrong and what to give instead.
    """
    validate_model_class(model)
    assert isinstance(model, PreTrainedModel)
    empty = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if empty:
        _refuse(
            model,
            f"{len(empty)} of its {sum(1 for _ in model.parameters())} parameters have no values ({empty[0]}, ...): it was taken by a "
            "session before or loaded with a device_map; load it again without one, or give its folder",
        )


def validate_model_class(model: object) -> None:
    """Rules 1 to 3, for a model with or without weights.

    Raises:
        UnsupportedModelError: with what is wrong and what to give instead.
    """
    if not isinstance(model, PreTrainedModel):
        cure = "give a transformers causal language model (PreTrainedModel), a model folder or a hub name"
        if isinstance(model, nn.Module):
            cure += "; take wrappers off before (a PEFT model: model.merge_and_unload(); DataParallel: model.module)"
        _refuse(model, f"it is no model of transformers; {cure}")
    if any(isinstance(module, StandIn) for module in model.modules()):
        _refuse(
            model, "this object was already taken by a session, which has its weights; load it again, or save that session and load that"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        _refuse(model, "adapters are attached to it; merge them into its weights or remove them first")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        _refuse(model, "its weights are quantized; load it without a quantization_config, or dequantize it")


def build_saved_config(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy of the model's configuration as transformers would save it: the parameters' dtype, the class as architecture."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    return config


def _refuse(model: object, reason: str) -> NoReturn:
    raise UnsupportedModelError(f"{type(model).__name__} cannot be streamed: {reason}")
