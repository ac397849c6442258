from mellmpi.runtime.served_models import mixed_arithmetic


def test_workers_that_compute_alike_give_no_warning():
    assert mixed_arithmetic({}) == "" == mixed_arithmetic({1: "a", 2: "a"})


def test_workers_that_compute_in_different_ways_are_named():
    said = mixed_arithmetic({1: "bfloat16 here", 2: "bfloat16 there", 3: "bfloat16 here"})
    assert "bfloat16 here: worker 1, 3; bfloat16 there: worker 2" in said
