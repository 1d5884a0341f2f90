"""From the optimizer's flags to the optimizer: `--optimizer`, `--beta1`, `--beta2`, `--momentum`, `--nesterov`, `--weight-decay`."""

from __future__ import annotations

import dataclasses

from overspill.cli.finetune import FinetuneOptions
from overspill.spec.update_rule import SGD, AdamW, Lion, Optimizer


def build_optimizer(options: FinetuneOptions) -> Optimizer:
    """The optimizer that the flags describe.

    Raises:
        ValueError: a flag that the optimizer does not have, or a value out of its range.
    """
    if options.optimizer == "sgd":
        _refuse(options, "adamw or lion", "beta1", "beta2")
        return SGD(lr=options.lr, momentum=options.momentum or 0.0, nesterov=options.nesterov, weight_decay=options.weight_decay)
    _refuse(options, "sgd", "momentum", "nesterov")
    kind = {"adamw": AdamW, "lion": Lion}[options.optimizer]
    optimizer = kind(lr=options.lr, weight_decay=options.weight_decay)
    beta1, beta2 = (usual if given is None else given for given, usual in zip((options.beta1, options.beta2), optimizer.betas, strict=True))
    return dataclasses.replace(optimizer, betas=(beta1, beta2))


def _refuse(options: FinetuneOptions, owner: str, *names: str) -> None:
    for name in names:
        if getattr(options, name) not in (None, False):
            raise ValueError(f"--{name} has no effect on --optimizer {options.optimizer}; leave it out, or use {owner}")
