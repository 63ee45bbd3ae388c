"""A site's rules change one attribute each, in their order."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import SPECIFIC_CHARACTER_SET
from dicomproxy.identity.coercion import Action, CoercionSettings, Rule, coerce, coerce_answer
from dicomproxy.identity.coercion_rules import needed_by

AT = datetime(2024, 2, 3, tzinfo=UTC)
INSTITUTION = 0x00080080
STATION = 0x00081010
SERIES_DESCRIPTION = 0x0008103E
BODY_PART = 0x00180015
CONTENT_DATE = 0x00080023
MODALITY = 0x00080060
MODALITIES_IN_STUDY = 0x00080061


def object_(**more: str) -> Identifier:
    made = Identifier()
    made.set_text(SPECIFIC_CHARACTER_SET, "ISO_IR 100")
    made.set_text(MODALITY, more.pop("modality", "CT"))
    made.set_text(INSTITUTION, "North")
    made.set_text(SERIES_DESCRIPTION, ["first", "second"], "LO")
    made.set_text(BODY_PART, "THORAX")
    return made


def after(view: Identifier, *rules: Rule, destination: str = "") -> Identifier:
    settings = CoercionSettings("north", "DICOMPROXY", rules=rules, keep_study_id=True)
    decision = coerce(view, None, settings, None, AT, destination)
    made = view.copy()
    for tag, element in decision.edits.items():
        if element is None:
            made.remove(tag)
        else:
            made.put(element)
    return made


@pytest.mark.parametrize(
    ("rule", "tag", "expected"),
    [
        (Rule(Action.SET, INSTITUTION, "LO", "There"), INSTITUTION, ("There",)),
        (Rule(Action.SET, STATION, "SH", "S1"), STATION, ("S1",)),
        (Rule(Action.SET, INSTITUTION, "LO", "A\\B"), INSTITUTION, ("A", "B")),
        (Rule(Action.SET, INSTITUTION, "LO", ""), INSTITUTION, ()),
        (Rule(Action.COPY, STATION, "SH", other=INSTITUTION), STATION, ("North",)),
        (Rule(Action.COPY, INSTITUTION, "LO", other=STATION), INSTITUTION, ("North",)),
        (
            Rule(Action.COPY, STATION, "SH", other=SERIES_DESCRIPTION),
            STATION,
            ("first", "second"),
        ),
        (Rule(Action.PREFIX, INSTITUTION, "LO", "N: "), INSTITUTION, ("N: North",)),
        (
            Rule(Action.PREFIX, SERIES_DESCRIPTION, "LO", "N: "),
            SERIES_DESCRIPTION,
            ("N: first", "N: second"),
        ),
        (Rule(Action.PREFIX, STATION, "SH", "N: "), STATION, ()),
        (Rule(Action.MAP, BODY_PART, "CS", table={"THORAX": "CHEST"}), BODY_PART, ("CHEST",)),
        (Rule(Action.MAP, BODY_PART, "CS", table={"HEAD": "SKULL"}), BODY_PART, ("THORAX",)),
        (
            Rule(Action.MAP, SERIES_DESCRIPTION, "LO", table={"second": "2"}),
            SERIES_DESCRIPTION,
            ("first", "2"),
        ),
        (Rule(Action.REMOVE, INSTITUTION, "LO"), INSTITUTION, ()),
        (Rule(Action.REMOVE, STATION, "SH"), STATION, ()),
    ],
)
def test_a_rule_does_what_it_says(rule: Rule, tag: int, expected: tuple[str, ...]) -> None:
    """To one value, to several, and to none."""
    assert after(object_(), rule).values(tag) == expected


def test_rules_see_what_those_before_them_left() -> None:
    """They are followed in their order."""
    rules = (
        Rule(Action.SET, STATION, "SH", "S1"),
        Rule(Action.COPY, INSTITUTION, "LO", other=STATION),
        Rule(Action.PREFIX, INSTITUTION, "LO", "N: "),
    )
    assert after(object_(), *rules).text(INSTITUTION) == "N: S1"


def test_values_are_cut_at_what_their_vr_holds() -> None:
    """Nobody has to refuse an object for the length of a rule's value."""
    view = object_()
    view.set_text(INSTITUTION, "x" * 64)
    copied = Rule(Action.COPY, STATION, "SH", other=INSTITUTION)
    prefixed = Rule(Action.PREFIX, INSTITUTION, "LO", "prefix ")

    assert after(view, copied).text(STATION) == "x" * 16
    assert after(view, prefixed).text(INSTITUTION) == "prefix " + "x" * 57


@pytest.mark.parametrize(
    ("rule", "name", "expected"),
    [
        (Rule(Action.COPY, BODY_PART, "CS", other=INSTITUTION), "Ärzte", ("THORAX",)),
        (Rule(Action.COPY, BODY_PART, "CS", other=INSTITUTION), "Chest", ("THORAX",)),
        (Rule(Action.COPY, BODY_PART, "CS", other=INSTITUTION), "CHEST", ("CHEST",)),
        (Rule(Action.PREFIX, BODY_PART, "CS", "n-"), "", ("THORAX",)),
        (Rule(Action.COPY, CONTENT_DATE, "DA", other=INSTITUTION), "20200101", ("20200101",)),
        (Rule(Action.COPY, CONTENT_DATE, "DA", other=INSTITUTION), "yesterday", ()),
    ],
)
def test_a_rule_makes_no_value_that_its_vr_does_not_have(
    rule: Rule, name: str, expected: tuple[str, ...]
) -> None:
    """It changes nothing then, and keeps no object from being delivered."""
    view = object_()
    view.set_text(INSTITUTION, name)

    assert after(view, rule).values(rule.tag) == expected


def test_a_rule_leaves_alone_what_a_source_wrote_wrong() -> None:
    """Of several values that are there already, the odd ones stay as they are."""
    view = object_()
    view.set_text(BODY_PART, ["THORAX", "Head"], "CS")

    changed = after(view, Rule(Action.MAP, BODY_PART, "CS", table={"THORAX": "CHEST"}))

    assert changed.values(BODY_PART) == ("CHEST", "Head")


@pytest.mark.parametrize(
    ("modalities", "destinations", "destination", "applies"),
    [
        ((), (), "", True),
        (("CT",), (), "ANY", True),
        (("MR", "CT"), (), "ANY", True),
        (("MR",), (), "ANY", False),
        ((), ("READING1",), "READING1", True),
        ((), ("READING1",), "READING2", False),
        (("CT",), ("READING1",), "READING1", True),
        (("MR",), ("READING1",), "READING1", False),
    ],
)
def test_a_rule_is_for_those_it_names(
    modalities: tuple[str, ...], destinations: tuple[str, ...], destination: str, applies: bool
) -> None:
    """By modality and destination; both where both are named."""
    rule = Rule(
        Action.REMOVE,
        INSTITUTION,
        "LO",
        modalities=frozenset(modalities),
        destinations=frozenset(destinations),
    )
    changed = after(object_(), rule, destination=destination)
    assert (INSTITUTION not in changed) is applies


def test_an_answer_about_a_study_has_all_its_modalities() -> None:
    """Where an answer names no modality of its own, any of the study's counts."""
    row = object_()
    row.remove(MODALITY)
    row.set_text(MODALITIES_IN_STUDY, ["MR", "CT"], "CS")
    rule = Rule(Action.SET, INSTITUTION, "LO", "There", modalities=frozenset({"CT"}))
    settings = CoercionSettings("north", "DICOMPROXY", rules=(rule,))

    answer = coerce_answer(row, None, settings, None)

    assert answer.text(INSTITUTION) == "There"
    assert MODALITIES_IN_STUDY in settings.tags


def test_a_rule_s_value_may_need_another_character_set() -> None:
    """It is written like every other value that does not fit."""
    changed = after(object_(), Rule(Action.SET, INSTITUTION, "LO", "Больница"))

    assert changed.text(INSTITUTION) == "Больница"
    assert changed.specific_character_set == ("ISO_IR 192",)


def test_what_rules_look_at_is_asked_for_with_what_they_change() -> None:
    """An answer without it would say something else than the object, also at one remove."""
    rules = (
        Rule(Action.COPY, SERIES_DESCRIPTION, "LO", other=BODY_PART),
        Rule(Action.REMOVE, INSTITUTION, "LO", modalities=frozenset({"CT"})),
        Rule(Action.COPY, STATION, "SH", other=SERIES_DESCRIPTION),
    )
    assert set(needed_by(rules, {STATION})) == {SERIES_DESCRIPTION, BODY_PART}
    assert needed_by(rules, {STATION, SERIES_DESCRIPTION, BODY_PART}) == []
    assert needed_by(rules, {INSTITUTION}, MODALITY) == [MODALITY]
    assert needed_by(rules, {INSTITUTION}) == needed_by(rules, {CONTENT_DATE}, MODALITY) == []


def test_what_rules_look_at_is_among_the_tags() -> None:
    """A header is read for all that a rule changes or copies from."""
    rules = (Rule(Action.COPY, STATION, "SH", other=BODY_PART),)
    tags = CoercionSettings("north", "DICOMPROXY", rules=rules).tags

    assert {STATION, BODY_PART} <= tags
    assert 0 not in tags
