"""Models and data of the Hugging Face ecosystem: taken apart into units, loaded, exported, tokenized."""

from overspill.huggingface.export import write_model_folder
from overspill.huggingface.host_reads import HostReads
from overspill.huggingface.meta_model import build_meta_model, swap_parameters_for_meta
from overspill.huggingface.model_object import validate_model_object
from overspill.huggingface.skeleton import copy_without_weights
from overspill.huggingface.stand_ins import share_equal_tensors
from overspill.huggingface.streamed_model import BlockOutput, Embedded, StreamedModel
from overspill.huggingface.weights import Checkpoint, expected_tensors, open_checkpoint

__all__ = [
    "BlockOutput",
    "Checkpoint",
    "Embedded",
    "HostReads",
    "StreamedModel",
    "build_meta_model",
    "copy_without_weights",
    "expected_tensors",
    "open_checkpoint",
    "share_equal_tensors",
    "swap_parameters_for_meta",
    "validate_model_object",
    "write_model_folder",
]
