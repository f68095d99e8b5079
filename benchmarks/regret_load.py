"""The requests of a run of the regret benchmark, and the figures that come of them.

What is asked for is a steady state, in few seconds: as many requests always on their way as the
plan takes, each somewhere between its beginning and its end. So

- the first requests are cut short, their answers to a random part, as if the run had found them
  under way, and their prompts, which come all at once, to a half: those that follow then start
  one after another, and now and then two in one step, as they do later on;
- half as many follow that are not measured either, for what is left of that beginning;
- then come those that are. They are the same requests, in the same order, for every
  plan of a load, dealt to its replicas in turn; of each eight, lengths and outputs lie once in each
  eighth of their range, so that any stretch of them is of nearly the mean length;
- others keep the engine as busy until the last of those is done, and are then aborted.

Tokens per second follow from how long the measured requests took (Little's law: as many as are on
their way, divided by the mean time of one, end each second). On a virtual clock that is within 2 %
of a run twenty times as long, and between draws of other requests it spreads by 0.5 to 1 % where
answers are of 128 tokens, 1 to 3 % where they are of 16; tokens counted in a window of the same run
spread by 3 to 8 %, since what is cut at both of its ends is left to chance.
Nothing here imports torch.
"""

import random
import statistics
from dataclasses import dataclass

from client import Timeline

# Lengths lie evenly within this share of what was asked, so that requests do not march in step.
SPREAD = 0.5
STRATA = 8
_FIRST_PROMPTS = 0.5  # of those that follow
# Measured in each replica at least: so many requests, so many tokens of answers, and, if that is
# not the more, so many requests for each that is on its way.
_LEAST, _LEAST_TOKENS, _MANY, _OF_EACH = 16, 2048, 64, 4
_FILLERS = 2  # for each that is on its way: enough for one half as long again as the others

Lengths = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one replica: (prompt, output) tokens of each, and which of them are measured.

    Attributes:
        lengths: In the order in which they are sent.
        in_flight: Always on their way.
        num_before: Sent before those that are measured.
        num_measured: After these.
    """

    lengths: Lengths
    in_flight: int
    num_before: int
    num_measured: int

    @property
    def until(self) -> int:
        """How many must be done, in the order in which they are sent."""
        return self.num_before + self.num_measured


def make_load(
    input_tokens: int,
    output_tokens: int,
    in_flight: int,
    *,
    rounds: float,
    replica: int = 0,
    dp: int = 1,
) -> Load:
    """Return the requests of `replica`, one of `dp`, with `in_flight` always on their way.

    Args:
        input_tokens: Of a prompt, on average.
        output_tokens: Of an answer, on average.
        in_flight: Of each replica.
        rounds: Requests measured for each that is on its way.
        replica: Which.
        dp: Of how many; the requests of a load are dealt to them, eight by eight.
    """
    least = max(_LEAST, round(_LEAST_TOKENS / output_tokens), min(_MANY, _OF_EACH * in_flight))
    wanted = max(round(rounds * in_flight), least)
    num_measured = -(-wanted // STRATA) * STRATA
    rng = random.Random(f"{input_tokens}+{output_tokens}")
    groups = (num_measured // STRATA + -(-_FILLERS * in_flight // STRATA)) * dp
    stream = [_eight(rng, input_tokens, output_tokens) for _ in range(groups)]
    mine = [one for group in stream[replica::dp] for one in group]
    own = random.Random(replica)
    short = max(1, round(_FIRST_PROMPTS * input_tokens))
    first = [(short, max(2, round(output_tokens * own.random()))) for _ in range(in_flight)]
    leading = -(-in_flight // (2 * STRATA))
    first += [one for _ in range(leading) for one in _eight(own, input_tokens, output_tokens)]
    return Load(first + mine, in_flight, len(first), num_measured)


def _eight(rng: random.Random, input_tokens: int, output_tokens: int) -> Lengths:
    prompts, outputs = (rng.sample(range(STRATA), STRATA) for _ in range(2))

    def length(tokens: int, stratum: int) -> int:
        share = (stratum + rng.random()) / STRATA
        return max(2, round(tokens * (1 + SPREAD * (2 * share - 1))))

    return [
        (length(input_tokens, prompt), length(output_tokens, output))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def figures(line: Timeline, load: Load) -> dict[str, float]:
    """Return what the measured requests of a run saw; times are means, `ttft_s` is a median."""
    names = list(line.sent)[load.num_before : load.until]
    sent = [line.sent[name] for name in names]
    times = [line.tokens[name] for name in names]
    whole = [one[-1] - begun for one, begun in zip(times, sent, strict=True)]
    steps = [(one[-1] - one[0]) / (len(one) - 1) for one in times]
    mean_output = statistics.fmean(map(len, times))
    request_s = statistics.fmean(whole)
    return {
        "output_tokens_per_s": load.in_flight * mean_output / request_s,
        "tpot_s": statistics.fmean(steps),
        "ttft_s": statistics.median(one[0] - begun for one, begun in zip(times, sent, strict=True)),
        "request_s": request_s,
        "seconds": max(one[-1] for one in times) - min(line.sent.values()),
    }
