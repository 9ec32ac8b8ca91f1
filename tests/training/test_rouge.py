import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from flexlora.training.rouge import is_exact_match, rouge_l

STOCK = RougeScorer(["rougeL"])


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_ascii_text_scores_exactly_as_rouge_score_does(answer, reference):
    expected = STOCK.score(reference, answer)["rougeL"].fmeasure
    if STOCK._tokenizer.tokenize(reference):
        assert rouge_l(answer, [reference]) == expected


def test_rouge_l_of_a_known_pair_is_as_computed_by_hand():
    # Longest common subsequence: the cat on the mat (5 words); 5/6 of the answer, 5/7 of the reference.
    score = rouge_l("The cat lay on the mat.", ["the small cat sat on the mat"])
    assert score == pytest.approx(2 * (5 / 6) * (5 / 7) / (5 / 6 + 5 / 7))


def test_the_best_reference_counts():
    assert rouge_l("a red apple", ["nothing alike", "a red apple", "a green apple"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("猫在垫子上", "猫在垫子上", 1.0),
        ("猫在桌子上", "猫在垫子上", 0.8),
        ("القطة على السجادة", "القطة على الطاولة", 2 / 3),
        ("बिल्ली चटाई पर है", "बिल्ली मेज पर है", 0.75),
        ("Кошка спит", "кошка СПИТ.", 1.0),
        ("año", "ano", 0.0),
        ("แมว", "แมว", 1.0),
        ("ネコは寝る", "ネコは走る", 0.8),
        ("东京 Tower 333", "東京 tower 333", 0.75),
    ],
)
def test_every_script_is_scored_by_its_words(answer, reference, expected):
    assert rouge_l(answer, [reference]) == pytest.approx(expected)


def test_an_answer_of_symbols_only_scores_by_exact_match():
    assert rouge_l(":-)", [":-)"]) == 1.0
    assert rouge_l(":-(", [":-)"]) == 0.0
    assert rouge_l("", ["word"]) == 0.0


def test_exact_match_ignores_case_and_white_space_only():
    assert is_exact_match("  The\n CAT ", ["a dog", "the cat"])
    assert not is_exact_match("the cat.", ["the cat"])
    assert not is_exact_match("", ["the cat"])
