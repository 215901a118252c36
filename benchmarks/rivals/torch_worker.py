"""A rival's process: transformers' model on PyTorch, in the peers' environment. Started by `benchmarks.peers`."""

import sys
import time
from functools import partial

import torch
import transformers

from benchmarks.rivals.job import Job, Setting, draw_tokens, read
from benchmarks.rivals.protocol import About, Take, resident, serve
from benchmarks.rivals.torch_models import build
from benchmarks.rivals.torch_step import make_step


def trainer(model: transformers.PreTrainedModel, job: Job, setting: Setting) -> Take:
    drawn = draw_tokens(job.sizes.vocab_size, job.batch, job.length)
    tokens_BT, targets_BT = (torch.from_numpy(x).long().to(model.device) for x in drawn)
    step = make_step(model, 3e-4, autocast=setting.autocast, compiled=setting.compiled)

    def take() -> tuple[dict[str, float], float]:
        begin = time.perf_counter()
        for _ in range(job.steps):
            loss = step(tokens_BT, targets_BT)
        found = loss.item()
        wait(model)
        return {"step": time.perf_counter() - begin}, found

    return take


def decoder(model: transformers.PreTrainedModel, job: Job, setting: Setting) -> Take:
    """A prefill of the prompts, and the likeliest token for each text, one after the other."""
    model.eval()
    tokens_BT = torch.from_numpy(draw_tokens(job.sizes.vocab_size, job.batch, job.length)[0]).long().to(model.device)
    static = transformers.StaticCache(config=model.config, max_cache_len=job.length + job.answer)
    # What transformers' own `generate` compiles a token with: on a GPU the kernels are started as one graph.
    step = torch.compile(model.forward, dynamic=False, mode="reduce-overhead") if setting.compiled else model.forward

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
        wait(model)
        filled = time.perf_counter()
        model.set_experts_implementation(setting.token_experts)
        for _ in range(job.answer):
            next_B1 = likeliest(step(next_B1, cache=cache, use_cache=True).logits)
        wait(model)
        return {"prefill": filled - begin, "decode": time.perf_counter() - filled}, None

    return take


def wait(model: transformers.PreTrainedModel) -> None:
    """Until all that was begun is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def begin(job: Job, setting: Setting) -> tuple[About, Take]:
    transformers.logging.set_verbosity_error()
    # As XLA's default has it: products of float32 in TF32, where there is such a thing.
    torch.set_float32_matmul_precision("high")
    model = build(job, setting).to("cuda" if job.device == "gpu" else "cpu")
    about = {
        "software": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return about, (trainer if job.task == "train" else decoder)(model, job, setting)


if __name__ == "__main__":
    job, setting = read(sys.argv[1])
    assert setting is not None
    serve(partial(begin, job, setting), torch.cuda.max_memory_allocated if job.device == "gpu" else resident)
