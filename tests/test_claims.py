"""What is proved about tools/claims.py: the rule of the verdicts, by hand; every line that it runs
is one that train.py takes; a report gives the numbers of the runs, at most 100 columns wide."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest

import train
from engine.stage import STAGES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import claims


def test_the_interval_of_five_seeds_by_hand():
    """1, 2, 3, 4, 5: mean 3, standard deviation sqrt(2.5), over sqrt(5): 0.7071; t with 4 degrees
    of freedom 2.776."""
    mean, half = claims.interval([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(2.776 * 0.5**0.5)


def test_a_verdict_needs_an_interval_on_one_side_of_zero():
    assert claims.verdict([1, 2, 3, 4, 5]) == "supported"
    assert claims.verdict([-1, -2, -3, -4, -5]) == "not supported"
    assert claims.verdict([-1, 2, 0, 4, -3]) == "undecided at this scale"
    assert claims.verdict([9.0]) == "undecided at this scale"
    # mean 0.4, half an interval 3.3: above -4
    assert claims.verdict([-1, 2, 0, 4, -3], margin=4) == "supported"
    assert claims.verdict([-9, -8, -9, -8, -9], margin=4) == "not supported"
    assert claims.judge(["supported", "supported"]) == "supported"
    undecided = "undecided at this scale"
    assert claims.judge(["supported", undecided]) == undecided
    assert claims.judge([undecided, "not supported"]) == "not supported"


@pytest.mark.parametrize("name", claims.RUNS)
def test_every_run_is_a_line_that_train_takes(name):
    stage, *flags = claims.RUNS[name].split()
    stage = train.parse(STAGES[stage], flags)
    assert stage.steps > 0 or name == "late, equal"
    assert all(other in claims.RUNS for other in claims.needs(claims.RUNS[name]))


def test_runs_come_after_what_they_stand_on_and_none_is_in_vain():
    order = claims.wanted()
    assert set(order) == set(claims.RUNS)
    for place, name in enumerate(order):
        assert set(claims.needs(claims.RUNS[name])) <= set(order[:place])


COMES_IN = {"weights", "masked", "multimodal"}  # what a run starts from is what some claims compare
ALONE = {("fusion", "multimodal"), ("fusion", "masked"), ("weak", "multimodal")}  # one encoder
OTHERS = {("masked", "multimodal"), ("multimodal", "masked"), ("masked", "scratch"),
          ("masked with 100 labels", "scratch with 100 labels"),
          ("masked with 1000 labels", "scratch with 1000 labels")}  # probes, another encoder
MORE_DIFFERS = {
    ("clip", "few negatives"): {"batch_size", "steps", "eval_every", "lr"},  # as many clips
    ("fusion", "late, equal"): {"steps"}}  # that is step 0 of the fusion


def test_what_is_compared_sees_as_many_clips_and_differs_in_one_flag_or_is_named_above():
    for pair in itertools.chain.from_iterable(claim.pairs for claim in claims.CLAIMS):
        for a, b in zip(pair[::2], pair[1::2]):
            flags = [claims.RUNS[name].split() for name in (a, b)]
            one, two = (train.parse(STAGES[stage], rest) for stage, *rest in flags)
            if type(one) is not type(two) or (a, b) in ALONE | OTHERS:
                continue
            if (a, b) != ("fusion", "late, equal"):
                assert one.steps * one.batch_size == two.steps * two.batch_size, (a, b)
            differ = {field.name for field in dataclasses.fields(one)
                      if getattr(one, field.name) != getattr(two, field.name)}
            assert len(differ - COMES_IN) <= 1 or differ == MORE_DIFFERS[a, b], (a, b, differ)
            stands_on = {claims.RUNS[name] for run in flags for name in claims.needs(" ".join(run))}
            assert len(differ) > 0 or len(stands_on) > 1


@pytest.mark.slow
def test_the_report_says_what_the_runs_say(tmp_path):
    for seed in range(3):
        for i, name in enumerate(claims.wanted()):
            place = claims.folder(tmp_path, seed, name)
            place.mkdir(parents=True)
            names = [*claims.MEAN, *(claim.metric for claim in claims.CLAIMS
                                     if isinstance(claim.metric, str))]
            values = {name.partition(" per second")[0]: 10.0 * i + seed for name in names}
            (place / "metrics.json").write_text(json.dumps(values | {"seconds": 5.0}))
    claims.report(tmp_path, 3, 60.0, 2)
    text = (tmp_path / "claims.md").read_text()
    facts = json.loads((tmp_path / "claims.json").read_text())
    assert len(facts["claims"]) == len(claims.CLAIMS)
    assert (tmp_path / "claims.png").stat().st_size > 0
    assert max(map(len, text.splitlines())) <= 100
    first = facts["claims"][0]
    places = [claims.wanted().index(name) for name in first["compared"][0]["runs"]]
    assert first["compared"][0]["mean"] == pytest.approx(10 * (places[0] - places[1]))
    assert f"## Claim 1: {first['verdict']}" in text and "3 seeds" in text


def test_measures_by_hand():
    run = {"a": 10.0, "b": 30.0, "seconds": 4.0}
    assert claims.measure(run, "a") == 10
    assert claims.measure(run, ("a", "b")) == 20
    assert claims.measure(run, "a per second") == 2.5
    assert claims.named(("test_motion", "test_shape")) == "motion and shape, mean of both"
    assert claims.named("val_mAP") == "validation mAP"
