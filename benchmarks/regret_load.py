"""The requests of a run of the regret benchmark, and the figures that come of them.

What is asked for is a steady state, in few seconds: as many requests always on their way as the
plan takes, each somewhere between its beginning and its end. So

- the first requests are cut short, their answers to a random part, as if the run had found them
  under way, and their prompts, which come all at once, to a quarter: those that follow then start
  one after another, and now and then two in one step, as they do later on;
- those that are measured follow them. They are the same requests, in the same order, for every
  plan of a load, dealt to its replicas in turn; of each eight, lengths and outputs lie once in each
  eighth of their range, so that any stretch of them is of nearly the mean length;
- others keep the engine as busy until the last of those is done, and are then aborted.

Tokens per second follow from how long the measured requests took (Little's law: as many as are on
their way, divided by the mean time of one, end each second). On a virtual clock, Llama-3.1-8B on
two H200 with TP2 and DP2, that is within 0.3 % of a run six times as long, and between draws of
other requests it spreads by 0.5 to 0.9 %; tokens counted in a window of the same run spread by
3 to 5 %, since what is cut at both of its ends is left to chance.
Nothing here imports torch.
"""

import random
import statistics
from dataclasses import dataclass

from client import Timeline

# Lengths lie evenly within this share of what was asked, so that requests do not march in step.
SPREAD = 0.5
STRATA = 8
_FIRST_PROMPTS = 0.25  # of those that follow
# Requests measured in each replica: one for each that is on its way, at least so many, and where
# there are few on their way, no more than so many for each.
_LEAST, _MANY, _OF_FEW = 16, 64, 4
_FILLERS = 2  # for each that is on its way: enough for one half as long again as the others

Lengths = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one replica: (prompt, output) tokens of each, and which of them are measured.

    Attributes:
        lengths: In the order in which they are sent.
        in_flight: Always on their way.
        num_measured: After the first `in_flight`.
    """

    lengths: Lengths
    in_flight: int
    num_measured: int

    @property
    def until(self) -> int:
        """How many must be done, in the order in which they are sent."""
        return self.in_flight + self.num_measured


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
    wanted = max(round(rounds * in_flight), min(_MANY, _OF_FEW * in_flight), _LEAST)
    num_measured = -(-wanted // STRATA) * STRATA
    rng = random.Random(f"{input_tokens}+{output_tokens}")
    groups = (num_measured // STRATA + -(-_FILLERS * in_flight // STRATA)) * dp
    stream = [_eight(rng, input_tokens, output_tokens) for _ in range(groups)]
    mine = [one for group in stream[replica::dp] for one in group]
    phases = random.Random(replica)
    short = max(1, round(_FIRST_PROMPTS * input_tokens))
    first = [(short, max(2, round(output_tokens * phases.random()))) for _ in range(in_flight)]
    return Load(first + mine, in_flight, num_measured)


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
    names = list(line.sent)[load.in_flight : load.until]
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
