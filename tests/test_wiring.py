"""What the configuration says arrives where it is followed."""

from __future__ import annotations

from dicomproxy.config import loads
from dicomproxy.dataset.patient import Domain
from dicomproxy.identity.coercion import Action, Code, CoercionSettings, Rule
from dicomproxy.wiring import coercion_settings

CONFIG = """\
proxy: {ae_title: DICOMPROXY}
local: {ae_title: LOCALPACS, host: 10.0.0.5, port: 104, patient_id_issuer: HERE}
cache: {directory: /var/cache/dicomproxy, max_size: 200GB}
sources:
  - name: north
    ae_title: NORTHPACS
    host: 10.9.0.4
    port: 104
    patient_id_issuer: {namespace: NORTH, universal_id: 1.2.3}
    identity: {cross_reference: staff, issuer: ignore}
    coerce:
      study_description_prefix: "[N] "
      study_id: keep
      descriptions: [{remote: CT Thorax, local: CT Chest}]
      procedure_codes: [{remote: 1^99N, local: 2^99H, meaning: CT Chest}]
      rules:
        - {action: set, attribute: InstitutionName, value: North, modalities: CT}
        - {action: copy, attribute: StationName, from_attribute: InstitutionName}
        - {action: prefix, attribute: InstitutionName, value: "N: ", destinations: READING1}
        - {action: map, attribute: BodyPartExamined, values: [{remote: A, local: B}]}
        - {action: remove, attribute: PatientAddress}
  - {name: sister, ae_title: SISTERPACS, host: 10.9.0.5, port: 104}
cross_references: [{name: staff, type: table, file: staff.csv}]
"""


def test_every_key_about_coercion_is_followed() -> None:
    """Names, codes, rules and domains become what the rules of identity work with."""
    settings = loads(CONFIG, "site.yaml")

    assert coercion_settings(settings, settings.sources[0]) == CoercionSettings(
        source="NORTHPACS",
        modifying_system="DICOMPROXY",
        domain=Domain("NORTH", "1.2.3", "ISO"),
        ignore_issuers=True,
        study_description_prefix="[N] ",
        descriptions={"CT Thorax": "CT Chest"},
        procedure_codes={("1", "99N"): Code("2", "99H", "CT Chest")},
        rules=(
            Rule(Action.SET, 0x00080080, "LO", "North", modalities=frozenset({"CT"})),
            Rule(Action.COPY, 0x00081010, "SH", other=0x00080080),
            Rule(Action.PREFIX, 0x00080080, "LO", "N: ", destinations=frozenset({"READING1"})),
            Rule(Action.MAP, 0x00180015, "CS", table={"A": "B"}),
            Rule(Action.REMOVE, 0x00101040, "LO"),
        ),
        keep_study_id=True,
    )


def test_a_source_without_a_domain_has_the_local_one() -> None:
    """Where nothing is said, only what always changes is changed."""
    settings = loads(CONFIG, "site.yaml")

    assert coercion_settings(settings, settings.sources[1]) == CoercionSettings(
        source="SISTERPACS", modifying_system="DICOMPROXY", domain=Domain("HERE")
    )
