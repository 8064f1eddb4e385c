import pytest

from hybridattn.evals.lm_eval.tasks import facts, filler
from hybridattn.evals.lm_eval.tasks.prompt import DoesNotFitError, assemble, fit, place


def test_forms():
    assert assemble("C", "Q?", "A:", "once") == "C\nA:"
    assert assemble("C", "Q?", "A:", "question_first") == "Q?\nC\nA:"
    assert assemble("C", "Q?", "A:", "twice") == "Q?\nC\nC\nA:"
    with pytest.raises(ValueError, match=r"form: expected one of .* got 'thrice'"):
        assemble("C", "Q?", "A:", "thrice")


def test_facts_are_at_their_depth():
    text = "".join(f"line {i}\n" for i in range(8))
    mixed = place(text, [(0.5, "half"), (0, "first"), (1, "last"), (0.5, "second half")]).splitlines()
    assert mixed[0] == "first"
    assert mixed[5:7] == ["half", "second half"]
    assert mixed[-1] == "last"
    assert [line for line in mixed if line.startswith("line")] == text.splitlines()


@pytest.mark.parametrize("rate", [0.25, 1, 3.7])
@pytest.mark.parametrize("most", [1000, 30_000])
def test_fit_counts_few_texts_and_never_exceeds(rate: float, most: int):
    measured = []

    def count(text: str) -> int:
        measured.append(text)
        return 100 + int(len(text) * rate) + len(text) // 50 % 7  # neither linear nor monotone

    size, text = fit("x".__mul__, count, most - most // 50, most)
    assert len(text) == size
    assert most - most // 50 <= count(text) <= most
    assert len(measured) <= 10


def test_impossible_lengths_raise():
    with pytest.raises(DoesNotFitError, match="at least 5 tokens for the facts and the question, got 4"):
        fit(lambda size: "x" * (size + 5), len, 3, 4)
    with pytest.raises(ValueError, match="expected 8 to 9 tokens, got 5 or 10"):
        fit(lambda size: "x" * 5 * (size + 1), len, 8, 9)


def test_filler_repeats_its_text_at_the_end():
    text = filler.local_text()
    assert "def " in text
    assert "\n\n" not in text
    assert filler.excerpt(len(text) - 5, 12 + len(text)) == text[-5:] + text + text[:7]
    start = filler.line_start(0.5)
    assert text[start - 1] == "\n"
    assert filler.line_start(1) in (0, len(text))


def test_no_drawn_word_occurs_in_the_filler():
    from random import Random

    rng = Random(0)
    words = facts.distinct(lambda: facts.word(rng), 2000)
    assert len(set(words)) == 2000
    assert not set(words) & filler.vocabulary()
    assert "self" in filler.vocabulary()
