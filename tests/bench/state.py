"""How much memory the profiles of many customers take: a process that holds nothing else."""

import json
import sys

import numpy as np
import psutil

from fraud_nb.features.profile import COUNT, Profiles
from fraud_nb.features.windows import DAY_MS, EVENT

KEPT_EVENTS = 60  # of each customer
MIB = 1 << 20


def fill(
    profiles: Profiles,
    customers: int,
) -> None:
    """A purchase a day for everybody, so that profiles grow side by side, as they do in life."""
    names = [f"c{number:07d}" for number in range(customers)]
    events = np.zeros(customers, EVENT)
    for day in range(KEPT_EVENTS):
        events["event_time"] = day * DAY_MS
        profiles.learn(names, events)
    kept = profiles.blocks[: len(profiles.slot_of), COUNT]
    if len(kept) != customers or (kept != KEPT_EVENTS).any():
        raise ValueError(f"profiles: not {KEPT_EVENTS} events of each customer are kept")


def main() -> int:
    """The last line is one JSON object: MiB before and after, of the whole process."""
    process, profiles = psutil.Process(), Profiles()
    fill(Profiles(), 1)  # compiled code is not state
    before = process.memory_info().rss
    fill(profiles, int(sys.argv[1]))
    after = process.memory_info().rss
    sys.stdout.write(json.dumps({"before_mib": before / MIB, "after_mib": after / MIB}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
