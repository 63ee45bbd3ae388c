"""Rules of coercion are checked before the first object is touched."""

from __future__ import annotations

import pytest

from dicomproxy.config import ConfigError, Settings, loads

HEAD = """\
proxy: {ae_title: DICOMPROXY}
local: {ae_title: LOCALPACS, host: 10.0.0.5, port: 104}
cache: {directory: /var/cache/dicomproxy, max_size: 200GB}
sources:
  - name: north
    ae_title: NORTHPACS
    host: 10.9.0.4
    port: 104
    coerce:
"""


def settings(*lines: str) -> Settings:
    return loads(HEAD + "".join(f"      {line}\n" for line in lines), "site.yaml")


def test_everything_that_can_be_said_is_taken() -> None:
    """Names, codes and rules are converted, attributes by keyword or tag."""
    coerce = (
        settings(
            'study_description_prefix: "[N] "',
            "study_id: keep",
            "descriptions: [{remote: CT Thorax, local: CT Chest}]",
            "procedure_codes: [{remote: 1^99N, local: 2^99H, meaning: CT Chest}]",
            "rules:",
            "  - {action: set, attribute: InstitutionName, value: North}",
            "  - {action: copy, attribute: '0008,103E', from_attribute: ProtocolName}",
            "  - {action: prefix, attribute: PatientComments, value: 'N: ', modalities: CT}",
            "  - {action: map, attribute: BodyPartExamined, values: [{remote: A, local: B}]}",
            "  - {action: remove, attribute: PatientAddress, destinations: [READING1]}",
        )
        .sources[0]
        .coerce
    )

    assert coerce.study_description_prefix == "[N] "
    assert coerce.study_id == "keep"
    assert coerce.descriptions[0].local == "CT Chest"
    assert coerce.procedure_codes[0].remote == ("1", "99N")
    first, second, third, fourth, last = coerce.rules
    assert first.attribute == (0x00080080, "LO", "InstitutionName")
    assert second.from_attribute is not None
    assert (second.attribute.tag, second.from_attribute.tag) == (0x0008103E, 0x00181030)
    assert third.modalities == ("CT",)
    assert fourth.values[0].local == "B"
    assert last.destinations == ("READING1",)


def test_nothing_said_changes_nothing_but_what_always_changes() -> None:
    """By default there is no mark, no map and no rule."""
    coerce = loads(HEAD, "site.yaml").sources[0].coerce

    assert coerce.study_description_prefix is None
    assert coerce.study_id == "empty"
    assert coerce.descriptions == coerce.procedure_codes == coerce.rules == ()


@pytest.mark.parametrize(
    ("line", "path", "expected"),
    [
        ("rules: [{action: set, attribute: Institution, value: x}]", "attribute", "a keyword"),
        ("rules: [{action: set, attribute: PatientID, value: x}]", "attribute", "not for rules"),
        ("rules: [{action: remove, attribute: StudyInstanceUID}]", "attribute", "not written"),
        ("rules: [{action: remove, attribute: PixelData}]", "attribute", "not written as text"),
        ("rules: [{action: set, attribute: InstitutionName}]", "value", "which set needs"),
        ("rules: [{action: copy, attribute: InstitutionName}]", "from_attribute", "copy needs"),
        ("rules: [{action: map, attribute: InstitutionName}]", "values", "which map needs"),
        ("rules: [{action: map, attribute: InstitutionName, values: []}]", "values", "map needs"),
        (
            "rules: [{action: remove, attribute: InstitutionName, value: x}]",
            "value",
            "no value: remove has none",
        ),
        (
            "rules: [{action: set, attribute: BodyPartExamined, value: Chest}]",
            "value",
            "a value of BodyPartExamined (VR CS",
        ),
        (
            "rules: [{action: map, attribute: StationName, values: [{remote: a, local: "
            "longer than sixteen}]}]",
            "values[0].local",
            "a value of StationName (VR SH",
        ),
        (
            "rules: [{action: prefix, attribute: StationName, value: longer than sixteen}]",
            "value",
            "less than the 16 characters",
        ),
        (
            "rules: [{action: prefix, attribute: BodyPartExamined, value: 'n: '}]",
            "value",
            "a value of BodyPartExamined (VR CS",
        ),
        (
            "rules: [{action: prefix, attribute: ContentDate, value: '1'}]",
            "attribute",
            "an attribute of text or codes",
        ),
        (
            "rules: [{action: copy, attribute: BodyPartExamined, from_attribute: ProtocolName}]",
            "from_attribute",
            "an attribute of VR CS, as BodyPartExamined is",
        ),
        ("rules: [{action: remove, attribute: Laterality}]", "attribute", "not for rules"),
        ("rules: [{action: cut, attribute: StationName}]", "action", "set or copy"),
        ("rules: [{action: remove, attribute: StationName, modalities: ct}]", "modal", "modality"),
        (
            "rules: [{action: map, attribute: StationName, values: [{remote: a, local: b}, "
            "{remote: a, local: c}]}]",
            "values[1].remote",
            "each once",
        ),
        (
            "descriptions: [{remote: a, local: b}, {remote: a, local: c}]",
            "descriptions[1].remote",
            "each once (it first stands in line 10)",
        ),
        ("procedure_codes: [{remote: 1, local: 2^H, meaning: x}]", "remote", "12345^99NORTH"),
        ("study_description_prefix: ''", "study_description_prefix", "a text of 1 to 32"),
        ("study_id: mint", "study_id", "empty or keep"),
    ],
)
def test_a_rule_that_cannot_work_is_a_fault(line: str, path: str, expected: str) -> None:
    """Told with its place in the file, and with what would do."""
    with pytest.raises(ConfigError) as caught:
        settings(line)
    (fault,) = caught.value.faults
    assert path in fault.path
    assert fault.path.startswith("sources[0].coerce")
    assert expected in fault.expected
    assert fault.line == 10
