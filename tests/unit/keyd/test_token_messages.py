"""What keyd and a token's process say to each other: there and back, and nothing else is taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyd.token.messages import Answer, Down, Failure, Nonsense, Question, Ready, decode


@pytest.mark.parametrize(
    "said",
    [
        Answer(7, b"signature"),
        Failure(7, "why not"),
        Ready((b"key", b"", "is not there")),
        Ready(()),
        Down(False, "gone"),
        Down(True, "for good"),
    ],
)
def test_there_and_back(said: Answer | Failure | Ready | Down) -> None:
    assert decode(said.encode()) == said


def test_a_question_there_and_back() -> None:
    question = Question(1 << 60, 3, 0x0804, 12345, bytes(48))
    assert Question.decode(question.encode()) == question
    with pytest.raises(Nonsense):
        Question.decode(question.encode() + b"\0")


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"X",
        b"A" + bytes(8),
        b"A" + bytes(8 + 1025),
        b"A" + bytes(7),
        b"F" + bytes(8 + 201),
        b"R\0",
        b"R\0\5P",
        b"R\0\0",
        b"R\0\1X",
        b"D\2why",
        b"D",
    ],
)
def test_nonsense(message: bytes) -> None:
    with pytest.raises(Nonsense):
        decode(message)


@given(st.binary())
def test_whatever_comes_is_decoded_or_refused(message: bytes) -> None:
    try:
        said = decode(message)
    except Nonsense:
        return
    if isinstance(said, Down | Failure):
        assert said.why.isprintable()
