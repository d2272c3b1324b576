"""Every rule on every kind of network: it learns, and its gradient points where it did
when `every_rule.py` was last run."""

from catalogue_case import one_in
from every_rule import NETS, RULES, measure


# Cosine with the gradient of BPTT, by all weights but the readout's, in windows of 4.
COSINES: dict[str, dict[str, float]] = {}
REFUSED: set[tuple[str, str]] = set()

CASES = [f"{net} - {rule}" for net in NETS for rule in RULES]


@one_in(9, CASES)
def test_a_rule_on_a_network(name):
    net, rule = name.split(" - ")
    found, first, last = measure(net, rule)
    assert abs(found - COSINES[net][rule]) < 0.02
    assert last < first


def test_the_table_has_every_rule_and_network():
    assert {net: set(row) for net, row in COSINES.items()} == {
        net: set(RULES) for net in NETS
    }


def test_the_exact_rules_are_exact_and_the_others_are_not():
    for row in COSINES.values():
        assert row["RTRL"] > 0.9995
        assert row["Immediate"] < 0.999
