"""`laps generate`: one prompt, its output as it comes."""

from __future__ import annotations

import io
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from laps.cli.options import client_options, print_json
from laps.errors import LocalError

if TYPE_CHECKING:
    from laps.client import Client, Completion


class _Bias(click.ParamType[tuple[int, float]]):
    name = "bias"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        token_id, _, bias = str(value).partition("=")
        try:
            return int(token_id), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not TOKEN=BIAS, as in 50256=-100", param, ctx)


@click.command()
@click.argument("prompt")
@click.option("--max-tokens", type=int, help="Output tokens at most.")
@click.option("--min-tokens", type=int, help="Output tokens at least, before a stop counts.")
@click.option("--temperature", type=float, help="0 is greedy.  [default: 0]")
@click.option("--top-p", type=float, help="Nucleus sampling, in (0, 1].")
@click.option("--top-k", type=int, help="Keep the k most likely tokens; 0 keeps all.")
@click.option("--min-p", type=float, help="Keep tokens at least this share as likely as the likeliest.")
@click.option(
    "--repetition-penalty", type=float, help="Divides the score of tokens already seen; 0.01 to 100."
)
@click.option(
    "--frequency-penalty", type=float, help="Lowers a token's score for each time that it came; -2 to 2."
)
@click.option("--presence-penalty", type=float, help="Lowers the score of tokens that came; -2 to 2.")
@click.option(
    "--logit-bias",
    type=_Bias(),
    multiple=True,
    metavar="TOKEN=BIAS",
    help="Adds to a token's score, -100 to 100; may be given again.",
)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--logprobs", type=int, help="Return log-probabilities, with so many alternatives.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends the output; may be given again.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end of text.")
@click.option("--priority", type=int, help="Higher runs first, in [-100, 100].  [default: 0]")
@click.option("--timeout-s", type=float, help="End the request after this time.")
@click.option("--request-id", metavar="ID", help="Idempotency key; a known one joins its request.")
@click.option("--request-class", metavar="NAME", help="Kind of work, for the scheduler's estimates.")
@click.option("--model", metavar="NAME", help="The model, where the gateway has several.")
@click.option("--chat", is_flag=True, help="PROMPT is a user's message; use the model's chat template.")
@client_options
def generate(
    client: Client,
    as_json: bool,
    prompt: str,
    chat: bool,
    stop: tuple[str, ...],
    logit_bias: tuple[tuple[int, float], ...],
    **options: Any,
) -> int:
    """Generate text for PROMPT ("-" reads it from standard input).

    The text goes to standard output as it comes, a summary line to standard error.
    """
    text = _standard_input() if prompt == "-" else prompt
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if stop:
        given["stop"] = list(stop)
    if logit_bias:
        given["logit_bias"] = dict(logit_bias)
    began_s = time.monotonic()
    with client.stream([{"role": "user", "content": text}] if chat else text, **given) as stream:
        for chunk in stream:
            if not as_json:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        completion = stream.result
    if as_json:
        print_json(completion)
    else:
        sys.stdout.write("\n")
        if completion.logprobs:
            _print_logprobs(completion)
    click.echo(summary(completion, time.monotonic() - began_s), err=True)
    return 1 if completion.finish_reason == "error" else 0


def _standard_input() -> str:
    # As bytes: read as text, what is no UTF-8 may become surrogates, which cannot be sent.
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise LocalError(f"standard input is not valid UTF-8 at byte {error.start}") from None
    # Lines end as they do in text.
    return io.StringIO(text, newline=None).read()


def summary(completion: Completion, took_s: float) -> str:
    """One line: how it ended, how fast it was, how speculation went."""
    tokens = completion.usage.completion_tokens or len(completion.token_ids)
    speculation, timing = completion.speculation, completion.timing
    parts = [completion.finish_reason, f"{tokens} tokens in {took_s:.2f} s"]
    if tokens and took_s > 0:
        parts[-1] += f" ({tokens / took_s:.1f} tokens/s)"
    parts.append(f"first after {timing.time_to_first_token_ms:.0f} ms")
    if speculation.num_steps:
        rate = speculation.draft_acceptance_rate
        parts.append(
            f"{speculation.mean_acceptance_length:.2f} tokens a step ({rate:.0%} of the draft accepted)"
        )
    if timing.preemptions:
        parts.append(f"preempted {timing.preemptions} times")
    if completion.resumptions:
        parts.append(f"resumed {completion.resumptions} times")
    if completion.error:
        parts.append(completion.error)
    return f"[{completion.request_id}] " + ", ".join(parts)


def _print_logprobs(completion: Completion) -> None:
    for token_id, logprob in zip(completion.token_ids, completion.logprobs, strict=False):
        others = " ".join(f"{top.token_id}:{top.logprob:.3f}" for top in logprob.top)
        click.echo(f"{token_id}\t{logprob.logprob:.4f}\t{others}".rstrip())
