"""How much of a prompt goes beside streams, and when two groups take turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wdmoe.backbone.graphs.alternation import BETTER, STAYS, WINDOW, Alternation
from wdmoe.backbone.graphs.pace import FIRST_TOKENS, Pace, shares


@given(st.integers(0, 500), st.lists(st.integers(1, 300), max_size=12))
def test_shares_are_whole_fair_and_all_that_fits(room: int, wanted: list[int]) -> None:
    given_ = shares(room, wanted)
    assert sum(given_) == min(room, sum(wanted))
    assert all(0 <= its <= want for its, want in zip(given_, wanted, strict=True))
    short = [its for its, want in zip(given_, wanted, strict=True) if its < want]
    if short:  # who gets less than it wants gets no less than anybody else, but for what does not divide
        assert min(short) + len(wanted) >= max(given_)


def test_who_waited_longest_stands_first() -> None:
    assert shares(2, [9, 9, 9]) == [1, 1, 0]
    assert shares(8, [9, 9, 1]) == [4, 3, 1]


def test_alone_a_prompt_has_all_the_room() -> None:
    assert Pace(128).room(0) == 128


@pytest.mark.parametrize(("step_s", "jump_s", "token_s"), [(0.05, 0, 0.004), (0.02, 0.004, 0.001), (0.1, 0.03, 0.02)])
def test_a_prompt_takes_as_long_as_a_step_of_the_streams_at_most(step_s: float, jump_s: float, token_s: float) -> None:
    """The first token of a prompt costs more than the next ones: more experts are asked."""
    pace = Pace(128)
    assert pace.room(1) == FIRST_TOKENS
    pace.took(0, 100, 0.03 + 100 * token_s)
    pace.took(1, 0, step_s)
    added = []
    for _ in range(120):
        room = pace.room(1)
        added.append(jump_s + room * token_s)
        pace.took(1, room, step_s + added[-1])
    assert max(added[30:]) <= step_s
    assert min(added[30:]) >= 0.3 * step_s
    assert pace.room(2) == pace.room(1)  # nothing is known of two: as of one


def test_at_least_one_token_goes_on() -> None:
    pace = Pace(128)
    pace.took(1, 0, 0.01)
    for _ in range(20):
        pace.took(1, pace.room(1), 8.0)
    assert pace.room(1) == 1


def test_a_hiccup_is_not_a_usual_step() -> None:
    """One pass of 0.9 s made the next prompt's pieces so long that the stream beside it paused for five steps."""
    pace, token_s = Pace(128), 0.006
    pace.took(0, 128, 0.13)  # alone and many at once, a prompt's tokens cost less: that says nothing of a few
    for seconds in (0.07, 0.07, 0.9, 0.07, 0.07):
        pace.took(1, 0, seconds)
    assert pace.room(1) == FIRST_TOKENS
    rooms = []
    for number in range(60):
        rooms.append(pace.room(1))
        pace.took(1, rooms[-1], 0.9 if number % 7 == 0 else 0.07 + rooms[-1] * token_s)
    assert max(rooms) * token_s < 0.07
    assert min(rooms) * token_s > 0.02


def test_the_end_of_a_prompt_says_nothing_of_longer_pieces() -> None:
    pace = Pace(128)
    pace.took(1, 0, 0.07)
    for _ in range(60):
        pace.took(1, 1, 0.071)
    assert pace.room(1) == FIRST_TOKENS


class Machine:
    """Passes of a station whose devices and radio take `away_s` for the tokens of all requests."""

    def __init__(self, compute_s: float, away_s: float) -> None:
        self.alternation = Alternation()
        self._compute_s, self._away_s = compute_s, away_s
        self.now_s = 0.0

    def run(self, passes: int, requests: int) -> None:
        for _ in range(passes):
            groups = min(self.alternation.groups, requests)
            tokens = requests // groups
            away_s = self._away_s * tokens / requests
            alone_s = self._compute_s + away_s
            # In turns a pass ends when both have computed, or when its own devices are back.
            took_s = alone_s if groups == 1 else max(2 * self._compute_s, alone_s) / 2
            self.now_s += took_s
            self.alternation.took(requests, tokens, away_s, alone_s, self.now_s)


def test_two_groups_where_the_wait_is_long() -> None:
    machine = Machine(0.02, 0.1)
    machine.run(3 * WINDOW, 4)
    assert machine.alternation.groups == 2
    machine.run(WINDOW, 1)
    assert machine.alternation.groups == 1  # one request has nobody to take turns with


def test_one_group_where_the_station_computes_all_the_time() -> None:
    machine = Machine(0.1, 0.02)
    for _ in range(10):
        machine.run(WINDOW, 4)
        assert machine.alternation.groups == 1


def test_what_does_not_pay_is_given_up_and_tried_again_much_later() -> None:
    alternation, now_s, tried = Alternation(), 0.0, 0
    for _ in range(2 * (STAYS + 3) * WINDOW):
        tried += alternation.groups == 2
        rate = 1.0 if alternation.groups == 1 else BETTER - 0.01
        now_s += 1 / rate
        alternation.took(4, 1, 0.9, 1.0, now_s)
    assert 0 < tried <= 3 * WINDOW


def test_with_a_shared_band_there_are_no_groups() -> None:
    machine = Machine(0.02, 0.1)
    machine.alternation = Alternation(allowed=False)
    machine.run(5 * WINDOW, 4)
    assert machine.alternation.groups == 1
