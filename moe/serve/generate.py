"""Text from a model: python -m moe.serve.generate RUN_OR_CHECKPOINT --prompt "In the beginning"

With --chat it talks, turn by turn, until an empty line. Exit codes: 0 done · 1 the system failed · 2 a mistake in the
arguments or files · 130 interrupted.
"""

import argparse
import sys
import time
from pathlib import Path

from moe.model.config import ConfigError
from moe.model.tensor_files import WeightsError
from moe.serve.chat import ChatError, chat_tokens
from moe.serve.engine import ContextError
from moe.serve.formats import add_formats, formats_of
from moe.serve.language_model import HunyuanMoE
from moe.serve.sampling import Sampling, SamplingError
from moe.train.checkpoint import CheckpointError
from parallel.layout import LayoutError
from parallel.malloc import use_large_pages
from parallel.mesh import MeshError, parse_mesh
from parallel.program_cache import keep_programs

MISTAKES = (ConfigError, WeightsError, MeshError, LayoutError, ContextError, SamplingError, ChatError)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    keep_programs()
    try:
        sampling = Sampling(
            options.max_tokens, options.temperature, options.top_k, options.top_p, options.seed, tuple(options.stop)
        )
        mesh = parse_mesh(options.mesh) if options.mesh else None
        print(f"loading {options.model} …", file=sys.stderr)
        model = HunyuanMoE.from_hf(options.model, mesh=mesh, adapters=options.adapters, **formats_of(options))
        if options.chat:
            _talk(model, sampling, options.system)
        else:
            prompt = options.prompt if options.prompt is not None else sys.stdin.read()
            print(prompt, end="")
            _write(model, model.vocabulary.encode(prompt), sampling)
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _talk(model: HunyuanMoE, sampling: Sampling, system: str | None) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        print("you> ", end="", flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        messages.append({"role": "user", "content": question})
        answer = _write(model, chat_tokens(messages, model.vocabulary), sampling)
        messages.append({"role": "assistant", "content": answer})


def _write(model: HunyuanMoE, prompt: list[int], sampling: Sampling) -> str:
    """Prints the answer as it comes, and the speed on standard error; returns it."""
    began, first, answer = time.perf_counter(), None, ""
    for text in model.stream_tokens(prompt, sampling):
        first = first or time.perf_counter()
        print(text, end="", flush=True)
        answer += text
    print()
    ended = time.perf_counter()
    tokens = len(model.vocabulary.encode(answer))
    if first is not None and tokens > 1:
        print(
            f"[{len(prompt)} prompt tokens, {tokens} new ones; first after {first - began:.2f} s with compilation, "
            f"then {(tokens - 1) / max(ended - first, 1e-9):.1f} tokens/s]",
            file=sys.stderr,
        )
    return answer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe.serve.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Sampling()
    parser.add_argument("model", type=Path, help="a checkpoint, a model folder, or the folder of a run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="text to go on from; by default what comes on standard input")
    what.add_argument("--chat", action="store_true", help="talk: each line is a question, an empty one ends")
    parser.add_argument("--system", help="with --chat: what the model is told before the first question")
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="only the k likeliest tokens; 0 for all")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, help="the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the draws (default: %(default)s)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end there; may be repeated")
    parser.add_argument("--mesh", metavar="AXIS=N,…", help="devices to use, such as data=2,expert=4; by default one")
    parser.add_argument(
        "--adapters", type=Path, metavar="FOLDER", help="LoRA adapters to merge in: a run that trained some, or PEFT's"
    )
    add_formats(parser)
    return parser


if __name__ == "__main__":
    use_large_pages()
    sys.exit(main())
