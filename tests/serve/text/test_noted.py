"""Tokens that a gateway keeps for a replica are those that came, and the seed of an answer gives the same anywhere."""

import json

from hypothesis import given
from hypothesis import strategies as st

from serve.engine.request import PromptOutput, Sampled, SamplingParams, Submission, TokenOutput
from serve.requests.begun import Begun, Ids
from serve.text.noted import Known, Noted

NUMBER = st.integers(0, 1 << 20)
SCORE = st.floats(max_value=0, allow_nan=False)
SAMPLED = st.builds(Sampled, NUMBER) | st.builds(
    Sampled, NUMBER, SCORE, st.lists(st.tuples(NUMBER, SCORE), max_size=3).map(tuple)
)
PROMPT = st.none() | st.builds(PromptOutput, NUMBER)
OUTPUT = st.builds(TokenOutput, st.just("id"), SAMPLED, st.sampled_from([None, "stop", "length"]), st.none(), PROMPT)


@given(st.lists(st.tuples(st.integers(0, 3), OUTPUT), max_size=9))
def test_tokens_come_back_as_they_were(outputs: list[tuple[int, TokenOutput]]) -> None:
    """Through JSON, with everything that the form of an answer reads of them."""
    noted = [Noted.of(index, output, is_last=output.finish_reason is not None) for index, output in outputs]
    read = Known(Begun(outputs=tuple(json.loads(json.dumps([each.to_json() for each in noted]))))).tokens
    assert read == noted
    assert [each.output("id") for each in read] == [output for _, output in outputs]


def test_a_choice_goes_on_behind_its_own_tokens() -> None:
    """Each choice has its tokens and a seed, its own if it has one; what the engine has ended is known."""
    known = Known(Begun("seed", 0.0, ([0, 5], [1, 6], [0, 7], [1, 8, "stop", None])))
    asked = Submission("id", (1, 2), SamplingParams(9))
    begun = [known.begin(asked, index) for index in range(3)]
    assert [each.output for each in begun] == [(5, 7), (6, 8), ()]
    assert known.ended == {1}
    seeds = [each.seed for each in begun]
    assert len(set(seeds)) == 3
    assert seeds == [Known(Begun("seed")).begin(asked, index).seed for index in range(3)]
    assert {each.params.seed for each in begun} == {None}, "as it was asked for, and as it is logged"


def test_a_choice_that_its_text_has_ended() -> None:
    """What a stop string has ended is known to have ended, though the engine did not say so."""
    noted = Noted.of(0, TokenOutput("id", Sampled(5)), is_last=True)
    known = Known(Begun(outputs=(noted.to_json(),)))
    assert known.ended == {0}
    assert known.tokens[0].output("id").finish_reason is None


@given(st.text(min_size=1), st.text(min_size=1))
def test_ids_are_of_their_seed(one: str, other: str) -> None:
    """The same of one seed, all different, and of another seed none the same."""
    first, again, second = Ids(one), Ids(one), Ids(other)
    found = [first.answer, *(first.new() for _ in range(5))]
    assert found == [again.answer, *(again.new() for _ in range(5))]
    assert len(set(found)) == 6
    assert one == other or set(found).isdisjoint([second.answer, second.new()])
