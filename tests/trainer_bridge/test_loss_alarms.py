"""Alarms: limits, trends, said once; history goes on after a restart."""

import msgspec

from everstep.trainer_bridge.losses.alarms import AlarmConfig, Alarms, AlarmState

HEALTHY = {"kl_k3": 1e-3, "mask_fraction": 1e-3, "exp_log_ratio_abs": 1.01, "invalid": 0.0}


def names(alarms):
    return [alarm.name for alarm in alarms]


def test_a_limit_is_reported_when_it_is_passed_and_not_again():
    alarms = Alarms(AlarmConfig())
    assert alarms.check(0, HEALTHY) == []
    [alarm] = alarms.check(1, HEALTHY | {"kl_k3": 0.06})
    assert alarm.message == "kl_k3 is 0.06 at update 1, above 0.05"
    assert alarms.check(2, HEALTHY | {"kl_k3": 0.07}) == []
    assert alarms.check(3, HEALTHY) == []
    assert names(alarms.check(4, HEALTHY | {"kl_k3": 0.07})) == ["kl_k3"]


def test_each_limit_has_its_alarm():
    bad = {"mask_fraction": 0.011, "exp_log_ratio_abs": 1.06, "invalid": 3.0}
    found = Alarms(AlarmConfig()).check(7, HEALTHY | bad)
    assert names(found) == ["mask_fraction", "exp_log_ratio_abs", "invalid"]
    assert found[2].message == "3 tokens of update 7 have a logprob that is not finite"


def test_a_trend_below_the_limit_is_seen_over_the_window():
    alarms = Alarms(AlarmConfig(window=40))
    seen = []
    for update in range(200):
        value = 0.002 if update < 60 else 0.002 + 0.0004 * (update - 60)
        seen += [
            (update, name) for name in names(alarms.check(update, {"kl_k3": min(value, 0.02)}))
        ]
    [(update, name)] = seen
    assert name == "kl_k3_trend"
    assert 60 < update < 100


def test_growth_of_what_is_tiny_is_no_trend():
    alarms = Alarms(AlarmConfig(window=8))
    assert not any(alarms.check(update, {"kl_k3": 1e-9 * 2**update}) for update in range(20))


def test_a_restart_goes_on_with_the_same_history():
    values = [{"mask_fraction": 0.001 + 0.0002 * update} for update in range(60)]
    alone, restarted = Alarms(AlarmConfig(window=20)), Alarms(AlarmConfig(window=20))
    for update, value in enumerate(values):
        stored = msgspec.json.encode(restarted.state)
        restarted = Alarms(AlarmConfig(window=20), msgspec.json.decode(stored, type=AlarmState))
        assert restarted.check(update, value) == alone.check(update, value)
    assert len(alone.state.history["mask_fraction"]) == 20


def test_an_update_of_nothing_raises_nothing_and_ends_nothing():
    alarms = Alarms(AlarmConfig())
    assert alarms.check(0, {}) == []
    assert names(alarms.check(1, {"kl_k3": 0.06})) == ["kl_k3"]
    assert alarms.check(2, {}) == []
    assert alarms.check(3, {"kl_k3": 0.06}) == []
