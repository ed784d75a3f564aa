"""Laws of pairs of times against their definitions."""

import pytest
import torch

from reflow_lab.dyn.times import LogitNormal
from reflow_lab.errors import UserError
from reflow_lab.flow_maps.times import DistanceTimes, SortedTimes, ToData

U = torch.rand(200_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WIDE = LogitNormal(-0.8, 1.6)
LAWS = {"AYF": DistanceTimes(WIDE), "MeanFlow": SortedTimes(WIDE), "sCM": ToData(WIDE)}


@pytest.mark.parametrize("name", LAWS)
def test_times_are_ordered_and_on_the_path(name):
    t, s = LAWS[name](U)
    assert t.shape == s.shape == (len(U),) and t.dtype == torch.float64
    assert (s >= 0).all() and (s <= t).all() and (t <= 1).all()


def test_the_distance_is_logit_normal_and_its_place_uniform():
    t, s = DistanceTimes(LogitNormal(-0.8, 1.0))(U)
    logit = torch.logit(t - s)
    assert float(logit.mean()) == pytest.approx(-0.8, abs=0.01) and float(logit.std()) == pytest.approx(1.0, abs=0.01)
    place = s / (1 - (t - s))
    assert float(place.mean()) == pytest.approx(0.5, abs=0.003) and float(place.std()) == pytest.approx(12**-0.5, abs=0.002)
    assert abs(float(torch.corrcoef(torch.stack((place, logit)))[0, 1])) < 0.01


def test_a_share_of_distances_is_none_and_the_others_are_as_before():
    t, s = DistanceTimes(LogitNormal(-0.8, 1.0), share_equal=0.3)(U)
    equal = t == s
    assert float(equal.double().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(t[equal].mean()) == pytest.approx(0.5, abs=0.005) and float(t[equal].std()) == pytest.approx(12**-0.5, abs=0.005)
    whole_t, whole_s = DistanceTimes(LogitNormal(-0.8, 1.0))(U)
    assert torch.equal(t[~equal], whole_t[~equal]) and torch.equal(s[~equal], whole_s[~equal])


def test_a_share_of_sorted_times_is_flow_matching():
    t, s = SortedTimes(LogitNormal(-0.4, 1.0), share_equal=0.75)(U)
    assert float((t == s).double().mean()) == pytest.approx(0.75, abs=0.005)
    t, s = SortedTimes(LogitNormal(-0.4, 1.0), share_equal=0)(U)
    both = torch.logit(torch.cat((t, s)))  # of the two, unordered again
    assert (
        (t > s).all() and float(both.mean()) == pytest.approx(-0.4, abs=0.01) and float(both.std()) == pytest.approx(1, abs=0.01)
    )


def test_a_consistency_model_jumps_to_data():
    t, s = ToData(LogitNormal(-0.8, 1.6))(U)
    assert not s.any() and float(torch.logit(t).std()) == pytest.approx(1.6, abs=0.02)


@pytest.mark.parametrize("law", [DistanceTimes, SortedTimes])
@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_mistakes(share, law):
    with pytest.raises(UserError, match=r"flow_map\.times\.share_equal=.*: must lie in \[0, 1\]"):
        law(WIDE, share_equal=share)
