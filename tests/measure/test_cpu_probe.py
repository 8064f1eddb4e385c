from hybridattn.measure.cpu_probe import describe_load, probe_seconds


def test_the_probe_times_its_work():
    assert 1e-5 < probe_seconds() < 10


def test_the_sentence_on_the_cpu_load():
    sentence = describe_load([2.0, 2.1, 2.0, 6.0, 2.6])
    assert "timed 5 times" in sentence
    assert "took 1.05 times its fastest time in the median and 3.00 times at most" in sentence
    assert "40% of its times were more than 10% above the fastest" in sentence
