"""A step of training on PyTorch that computes what `moe.train.step` does. Runs in the peers' environment."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.functional import cross_entropy


def make_step(
    model: torch.nn.Module, learning_rate: float, *, autocast: bool = False, compiled: bool = False
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of tokens_BT and targets_BT that takes a step and returns the loss before it, nats a token. On a GPU
    it does not wait for either.

    The loss is the mean cross-entropy over all positions. Gradients are clipped to norm 1; AdamW decays all but norms,
    as `OptimizerConfig` has it by default, at a constant rate.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def loss_of(tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV = model(tokens_BT, use_cache=False).logits
        return cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def step(tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens_BT.device.type, torch.bfloat16) if autocast else nullcontext():
            loss = loss_of(tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
