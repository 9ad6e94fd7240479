"""The cap on declines: never passed by one process, and nobody is held back for nothing."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fraud_nb.decision.breaker import Breaker, Declines
from fraud_nb.domain.schema import Outcome
from fraud_nb.features.windows import DAY_MS, MINUTE_MS

purchases = st.lists(st.tuples(st.sampled_from(list(Outcome)), st.integers(0, 4 * MINUTE_MS)), max_size=60)


@given(st.integers(1, 5), st.lists(purchases, max_size=4))
def test_the_first_so_many_declines_of_a_minute_stand(most: int, batches: list[list[tuple[Outcome, int]]]) -> None:
    breaker, seen = Breaker(most), Counter[int]()
    for batch in batches:
        held = breaker.beyond_cap([outcome for outcome, _ in batch], [time_ms for _, time_ms in batch])
        for (outcome, time_ms), too_many in zip(batch, held, strict=True):
            is_decline = outcome is Outcome.DECLINE
            assert too_many == (is_decline and seen[time_ms // MINUTE_MS] >= most)
            seen[time_ms // MINUTE_MS] += is_decline


def test_the_log_has_the_last_word_about_two_minutes() -> None:
    breaker, now_ms = Breaker(2), 100 * MINUTE_MS
    declines = [Outcome.DECLINE] * 3
    times = [now_ms - 5 * MINUTE_MS, now_ms - MINUTE_MS, now_ms]
    assert not any(breaker.beyond_cap(declines, times))  # one in each of three minutes
    asked: list[int] = []

    def count(since_ms: int) -> dict[int, Declines]:
        asked.append(since_ms)
        return {100: Declines(2, 7)}  # ours was rolled back in minute 99, and another process declined in minute 100

    breaker.learn(count, now_ms + 30_000)
    assert asked == [99 * MINUTE_MS] and breaker.held_back == 7
    assert breaker.beyond_cap(declines, times) == [False, False, True]
    breaker.learn(lambda since_ms: {}, now_ms + 2 * DAY_MS)
    assert breaker.declined == {}, "what is long ago is forgotten"


def test_without_a_cap_nobody_is_asked() -> None:
    breaker = Breaker()
    breaker.learn(lambda since_ms: 1 / 0, 0)  # type: ignore[arg-type, return-value]
    assert breaker.beyond_cap([Outcome.DECLINE], [0]) == [False] and breaker.declined == {}
