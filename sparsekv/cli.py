"""The `sparsekv` command: demo, generate, eval, lm-eval, bench, doctor."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsekv.errors import ConfigError, SparseKVError

DTYPES = ("auto", "float32", "bfloat16", "float16")
EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 130  # argparse itself exits with 2 for unknown options


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `sparsekv` command; returns the exit code.

    0: done; 1: an error, named on stderr; 2: a misspelt option; 130: interrupted.
    """
    arguments = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(_spelt_out(arguments))
    try:
        run: Callable[[argparse.Namespace, str], int] = args.run
        return run(args, shlex.join(["sparsekv", *arguments]))
    except BrokenPipeError:  # `sparsekv ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except (SparseKVError, OSError) as error:
        print(f"sparsekv: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("sparsekv: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _spelt_out(arguments: list[str]) -> list[str]:
    """`sparsekv bench OPTIONS` is short for `sparsekv bench attention OPTIONS`, as is `eval` for `eval run`."""
    rest = arguments[1:]
    if arguments[:1] == ["eval"]:
        from sparsekv.evaluation.eval_command import spelt_out

        return ["eval", *spelt_out(rest)]
    if arguments[:1] == ["lm-eval"]:
        return ["lm-eval", "--", *rest]  # all that follows is lm_eval's, its options too
    if arguments[:1] != ["bench"] or (rest and (not rest[0].startswith("-") or rest[0] in ("-h", "--help"))):
        return arguments
    return ["bench", "attention", *rest]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsekv",
        description="Query-aware sparse attention: Hugging Face models decode long contexts by reading few pages.",
        epilog="`sparsekv COMMAND --help` lists a command's options.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_generate(commands)
    _add_eval(commands)
    _add_lm_eval(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands: Any) -> None:
    from sparsekv.evaluation import demo

    parser = commands.add_parser(
        "demo",
        help="a small model answers questions about a long story, dense beside sparse",
        description=demo.__doc__,
    )
    demo.add_arguments(parser)
    parser.set_defaults(run=demo.run)


def _add_bench(commands: Any) -> None:
    from sparsekv.evaluation import speed

    parser = commands.add_parser(
        "bench",
        help="time a decode step or a token of generate, sparse beside dense",
        description="Times sparse attention beside dense attention. `sparsekv bench OPTIONS` is short for "
        "`sparsekv bench attention OPTIONS`.",
        epilog="`sparsekv bench WHAT --help` lists the options.",
    )
    speed.add_commands(parser)


def _add_eval(commands: Any) -> None:
    from sparsekv.evaluation import eval_command

    parser = commands.add_parser(
        "eval",
        help="how much accuracy a method and budget cost, and what it reads",
        description="Asks a model questions about long documents, densely and sparsely. `sparsekv eval OPTIONS` is "
        "short for `sparsekv eval run OPTIONS`.",
        epilog="`sparsekv eval WHAT --help` lists the options.",
    )
    eval_command.add_commands(parser)


def _add_lm_eval(commands: Any) -> None:
    from sparsekv.evaluation.lm_harness import command

    parser = commands.add_parser(
        "lm-eval",
        help="EleutherAI's lm-evaluation-harness, decoding sparsely",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="let a model of your own continue a prompt, sparsely",
        description="Loads a transformers model, patches it, and streams its continuation of a prompt. What was "
        "read of the cache is printed to stderr at the end.",
    )
    parser.add_argument("--model", required=True, metavar="ID_OR_PATH", help="model id on the hub, or a folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", metavar="F", help="text file with the prompt; - for standard input")
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    parser.add_argument("--budget", type=_budget, default=2048, help="tokens read per kv head, or a fraction (0.1)")
    parser.add_argument("--policy", default="top_k", help="which pages are read (default %(default)s)")
    parser.add_argument("--digest", default="minmax", help="what pages are chosen by (default %(default)s)")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="at most so many (default %(default)s)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights (default: the model's own)")
    parser.set_defaults(run=_generate)


def _add_doctor(commands: Any) -> None:
    from sparsekv.evaluation.report import positive

    parser = commands.add_parser("doctor", help="versions, devices, and what would run where")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--compile", action="store_true", help="compile all kernels now rather than at first use")
    parser.add_argument("--arch", nargs="+", metavar="SM", help="for these, as sm_90 (default: the GPUs present)")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="at once (default %(default)s)")
    parser.set_defaults(run=_doctor)


def _generate(args: argparse.Namespace, command: str) -> int:
    import transformers

    import sparsekv
    from sparsekv.evaluation.report import choose_device

    text = _read_prompt(args)
    config = sparsekv.SparseConfig(
        budget=args.budget, policy=args.policy, digest=args.digest, page_size=args.page_size
    )
    sparsekv.DIGESTS.get(config.digest), sparsekv.POLICIES.get(config.policy)  # before a large model is loaded
    device = choose_device(args.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(device).eval()
    inputs = _encode(tokenizer, text, args.chat).to(device)
    with sparsekv.patch(model, config) as patch:
        print(patch, file=sys.stderr)
        streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(**inputs, max_new_tokens=args.max_new_tokens, streamer=streamer)
        print(patch.stats, file=sys.stderr)
    return EXIT_OK


def _encode(tokenizer: Any, text: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if tokenizer.chat_template is None:
        raise ConfigError("--chat: this model's tokenizer has no chat template. Leave --chat out.")
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        text: str = args.prompt
    elif args.prompt_file == "-":
        text = sys.stdin.read()
    else:
        text = Path(args.prompt_file).read_text(encoding="utf-8")
    if not text.strip():
        raise ConfigError("The prompt is empty.")
    return text


def _budget(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _doctor(args: argparse.Namespace, command: str) -> int:
    from rich.console import Console

    from sparsekv import doctor

    if args.arch and not args.compile:
        raise ConfigError("--arch goes with --compile.")
    compiled = {"compile": doctor.compile_kernels(args.arch, args.jobs)} if args.compile else {}
    report = doctor.report() | compiled
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        Console().print(doctor.render(report))
    return EXIT_ERROR if compiled and compiled["compile"]["failed"] else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
