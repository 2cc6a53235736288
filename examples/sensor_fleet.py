"""A fleet of pumps, each with a memory of its own: one request an hour for all of them.

Every pump's temperature is fed to the shipped `temperature` model, which says what it expected. The pump whose
readings surprise it most is the one to look at. Run it twice, or kill it and run it again: the readings have keys, so
none is fed twice, and the memories go on where they were.

    python examples/sensor_fleet.py --pumps 200 --hours 48
"""

import argparse
import math
import random
from collections import defaultdict

from recurra_client import Client, Line, RecurraError, Steps

MODEL = "temperature"


def reading(pump: int, hour: int, failing: int) -> float:
    """A made reading in °C: day and night, some noise; the failing pump jumps about after its first day."""
    noise = random.Random(f"{pump}/{hour}")
    degrees = 18.0 + pump % 7 + 4.0 * math.sin(2 * math.pi * (hour - 9) / 24) + noise.gauss(0, 0.3)
    return degrees + noise.choice((-9.0, 9.0)) if pump == failing and hour >= 24 else degrees


def main() -> None:
    """Feed the fleet hour by hour, then say which pump is odd and what the next hours bring for it."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--fleet", default="fleet", help="the beginning of the sessions' ids")
    options.add_argument("--pumps", type=int, default=200)
    options.add_argument("--hours", type=int, default=48)
    options.add_argument("--failing", type=int, default=17, help="which pump fails")
    chosen = options.parse_args()

    surprises: dict[str, list[float]] = defaultdict(list)
    with Client(chosen.url) as client:
        for hour in range(chosen.hours):
            lines = [
                Line(
                    f"{chosen.fleet}-{pump}",
                    [reading(pump, hour, chosen.failing)],
                    model=MODEL,
                    key=f"hour-{hour}",
                )
                for pump in range(chosen.pumps)
            ]
            for line, answer in zip(lines, client.bulk(lines), strict=True):
                note(line.session, answer, surprises)
            if hour % 24 == 23:
                print(f"hour {hour + 1}: {chosen.pumps} pumps fed")

        odd = max(surprises, key=lambda pump: sum(surprises[pump]) / len(surprises[pump]))
        print(f"look at {odd}: surprised by {sum(surprises[odd]) / len(surprises[odd]):.2f} a reading")
        with client.session(odd) as pump:
            for step in pump.forecast(3).steps:
                print(f"  in {step.step} h: {step.mean['temperature']:.1f} °C")


def note(pump: str, answer: Steps | RecurraError, surprises: dict[str, list[float]]) -> None:
    """Keep how surprised the model was by a reading; the first one can not surprise it."""
    if isinstance(answer, RecurraError):
        raise SystemExit(f"{pump}: {answer}")
    if answer.last.surprise is not None:
        surprises[pump].append(answer.last.surprise)


if __name__ == "__main__":
    main()
