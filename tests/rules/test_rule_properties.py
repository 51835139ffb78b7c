"""What holds for any rules: order is nothing, every site has one, precedence is four steps."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from rule_cases import (
    GLOBAL,
    INT4,
    INT8,
    NET,
    SITES,
    kind,
    name,
)

from qrecipe.rules.resolution import resolve

# --- properties

KEYS = st.sampled_from(
    [
        "conv1",
        "bn1",
        "conv?",
        "layer1",
        "layer1.0",
        "layer1.*",
        "layer1.**",
        "layer1.0.conv1",
        "layer1.0.conv[12]",
        "layer1.0.*",
        "layer1.0:add",
        "layer1.0:add#1",
        "layer1.0.relu",
        "layer1.0.relu#1",
        "layer?",
        "layer4.?",
        "layer?.0",
        "**.conv1",
        "first",
        "layer4.2",
        ":flatten",
        "nothing",
    ]
)
VALUES = st.sampled_from([INT8, INT4, None])
NAME_RULES = st.dictionaries(KEYS, VALUES, max_size=7).map(
    lambda table: [name(key, value) for key, value in table.items()]
)
TYPE_RULES = st.dictionaries(
    st.sampled_from(["torch.nn.Conv2d", "torch.nn.ReLU", "models.Block", "torch.nn.Sequential"]),
    VALUES,
    max_size=3,
).map(lambda table: [kind(key, value) for key, value in table.items()])
RULES = st.tuples(NAME_RULES, TYPE_RULES).map(lambda both: [GLOBAL, *both[0], *both[1]])


@given(RULES, st.randoms(use_true_random=False))
def test_the_order_of_keys_never_matters(rules, random):
    shuffled = random.sample(rules, len(rules))
    one, two = resolve(NET, rules), resolve(NET, shuffled)
    assert one.covered == two.covered
    assert {f.code for f in one.findings} == {f.code for f in two.findings}
    for site, decision in one.decisions.items():
        assert decision.rule == two.decisions[site].rule
        assert set(decision.shadowed) == set(two.decisions[site].shadowed)


@given(RULES)
def test_every_site_is_decided_once_and_by_a_rule_that_covers_it(rules):
    resolution = resolve(NET, rules)
    assert list(resolution.decisions) == SITES
    for site, decision in resolution.decisions.items():
        assert site in resolution.covered[decision.rule]
        assert decision.rule not in decision.shadowed
    for a_rule, sites in resolution.covered.items():
        assert len(sites) == len(set(sites))
        for site in sites:
            decision = resolution.decisions[site]
            assert a_rule is decision.rule or a_rule in decision.shadowed


@given(RULES)
def test_the_winner_follows_the_four_steps_of_precedence(rules):
    """An oracle that is as plain as the text: one comparison a step, on the first member."""
    resolution = resolve(NET, rules)
    if any(finding.code == "QR304" for finding in resolution.findings):
        return
    for operation in NET.operations:
        ranked = [
            (step, a_rule) for a_rule in rules if (step := _steps(a_rule, operation.members[0]))
        ]
        best = min(step for step, _ in ranked)
        top = [a_rule.qconfig for step, a_rule in ranked if step == best]
        assert resolution.decisions[operation.name].rule.qconfig in top
        assert len(set(top)) == 1


def _steps(a_rule, member):
    """(tier, distance, glob) or None: whom the key matches, from the call outwards."""
    if a_rule.tier == "global":
        return (2, 0, 0)
    key = a_rule.key.removesuffix(".**")
    call_name = member.name if "#" in member.name else f"{member.name}#0"
    own = {call_name, call_name.partition("#")[0]}
    aliases = {path: alias for alias, path in NET.aliases.items()}
    chain = [own, *({path} for path in member.scopes if path not in own)]
    for distance, paths in enumerate(chain):
        paths = paths | {aliases[path] for path in paths if path in aliases}
        if a_rule.tier == "module_type":
            hit = any(key in NET.modules.get(path, ()) for path in paths)
        else:
            hit = any(_matches(key, path) for path in paths if path)
        if hit:
            is_glob = a_rule.tier == "module_name" and any(c in key for c in "*?[")
            return (0 if a_rule.tier == "module_name" else 1, distance, is_glob)
    return None


def _matches(key, path):
    pattern = re.escape(key).replace(r"\*\*\.", r"(?:.*\.)?").replace(r"\*\*", r"[^:#]*")
    pattern = pattern.replace(r"\*", r"[^.:#]*").replace(r"\?", r"[^.:#]")
    pattern = pattern.replace(r"\[12\]", "[12]")
    return re.fullmatch(pattern, path) is not None
