"""A model object's structure without its weights, so that a session can look at a model before it takes it over."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from overspill.huggingface.meta_model import swap_parameters_for_meta
from overspill.huggingface.model_object import validate_model_object


def copy_without_weights(model: PreTrainedModel, *, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of `model` with meta parameters of `dtype` (but for those it keeps in fp32); ties stay ties, buffers are copied.

    The model itself is not touched, whatever happens to the copy.

    Raises:
        UnsupportedModelError: it is no model object that can be taken over, or has no weights.
    """
    validate_model_object(model)
    without = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    copied = copy.deepcopy(model, without)
    swap_parameters_for_meta(copied, dtype=dtype)
    return copied
