"""A rival's process: transformers' model on PyTorch, in the peers' environment. Started by `benchmarks.peers`."""

import sys
import time
from contextlib import nullcontext

import torch
import transformers
from torch.nn.functional import cross_entropy

from benchmarks.rivals.job import Job, Setting, draw_tokens, read
from benchmarks.rivals.protocol import About, Take, serve
from benchmarks.rivals.torch_models import build


def trainer(model: transformers.PreTrainedModel, job: Job, setting: Setting) -> Take:
    """The step of `moe.train.step`: mean cross-entropy over all positions, gradients clipped to norm 1, AdamW that
    decays all but norms."""
    tokens_BT, targets_BT = (
        torch.from_numpy(x).long() for x in draw_tokens(job.sizes.vocab_size, job.batch, job.length)
    )
    parameters = list(model.parameters())
    decayed, undecayed = ([p for p in parameters if (p.ndim > 1) is matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def loss_of(tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV = model(tokens_BT, use_cache=False).logits
        return cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    if setting.compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def take() -> tuple[dict[str, float], float]:
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if setting.autocast else nullcontext():
            loss = loss_of(tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        told = loss.item()
        return {"step": time.perf_counter() - begin}, told

    return take


def decoder(model: transformers.PreTrainedModel, job: Job, setting: Setting) -> Take:
    """A prefill of the prompts, and the likeliest token for each text, one after the other."""
    model.eval()
    tokens_BT = torch.from_numpy(draw_tokens(job.sizes.vocab_size, job.batch, job.length)[0]).long()
    static = transformers.StaticCache(config=model.config, max_cache_len=job.length + job.answer)
    step = torch.compile(model.forward, dynamic=False) if setting.compiled else model.forward

    def likeliest(logits_BTV: torch.Tensor) -> torch.Tensor:
        return logits_BTV[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def take() -> tuple[dict[str, float], None]:
        static.reset()
        cache = static if setting.cache == "static" else transformers.DynamicCache(config=model.config)
        model.set_experts_implementation(setting.experts)
        begin = time.perf_counter()
        # The head is for the last position only.
        next_B1 = likeliest(model(tokens_BT, cache=cache, use_cache=True, logits_to_keep=1).logits)
        filled = time.perf_counter()
        model.set_experts_implementation(setting.token_experts)
        for _ in range(job.answer):
            next_B1 = likeliest(step(next_B1, cache=cache, use_cache=True).logits)
        return {"prefill": filled - begin, "decode": time.perf_counter() - filled}, None

    return take


def begin() -> tuple[About, Take]:
    job, setting = read(sys.argv[1])
    assert setting is not None
    transformers.logging.set_verbosity_error()
    model = build(job, setting)
    about = {
        "software": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return about, (trainer if job.task == "train" else decoder)(model, job, setting)


if __name__ == "__main__":
    serve(begin)
