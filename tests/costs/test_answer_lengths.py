from mellmpi.costs import MEMORY, AnswerLengths


def test_the_oldest_answer_is_overwritten_first():
    lengths = AnswerLengths()
    lengths.add(7)
    assert (len(lengths), lengths.output[0]) == (1, 7)
    for i in range(MEMORY):
        lengths.add(i + 1)
    assert len(lengths) == MEMORY and lengths.total == MEMORY + 1
    assert sorted(lengths.output) == list(range(1, MEMORY + 1))


def test_the_mean_is_over_the_answers_in_memory():
    lengths = AnswerLengths()
    assert lengths.mean_output(128.0) == 128.0
    for i in range(MEMORY + 100):
        lengths.add(i)
    assert lengths.mean_output(128.0) == lengths.output.mean()
