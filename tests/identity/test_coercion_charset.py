"""Names of every script survive coercion, and everything can be taken back."""

from __future__ import annotations

import io
import warnings
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, Sequence, dcmread
from pydicom.dataset import FileDataset
from pydicom.uid import UID

from dicomproxy.dataset.header import (
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
)
from dicomproxy.dataset.identifier import Element, Identifier
from dicomproxy.dataset.part10 import build_file_meta
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.accession import Shown
from dicomproxy.identity.coercion import (
    Action,
    Code,
    Coercer,
    CoercionSettings,
    LocalPatient,
    Rule,
    coerce_answer,
)
from dicomproxy.identity.safety import Demographics
from tests.support.datasets import data_set_bytes, instance

AT = datetime(2024, 2, 3, tzinfo=UTC)
HERE = Domain("HERE", "1.2.3.9", "ISO")
SETTINGS = CoercionSettings("north", "DICOMPROXY", Domain("NORTH"))

JAPANESE = ["", "ISO 2022 IR 87"]
NAMES: dict[str, tuple[Any, str]] = {
    "ascii": (None, "Doe^Jane"),
    "latin": ("ISO_IR 100", "Müller^Zoë"),
    "cyrillic": ("ISO_IR 144", "Люкceмбypг^Анна"),
    "japanese": (JAPANESE, "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    "chinese": ("GB18030", "Wang^XiaoDong=王^小东"),
    "unicode": ("ISO_IR 192", "Łukasz^Ő=王^小东=Анна"),
}


def rewritten(
    dataset: Dataset, patient: LocalPatient, settings: CoercionSettings, accessions: Any = None
) -> FileDataset:
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    return read(dataset, coerced(data_set_bytes(dataset), syntax, patient, settings, accessions))


def coerced(
    data: bytes, syntax: str, patient: LocalPatient, settings: CoercionSettings, accessions: Any
) -> bytes:
    made = Coercer(patient, settings, accessions, AT).rewrite(
        lambda at, size: data[at : at + size], len(data), syntax
    )
    return b"".join(made.chunks())


def read(dataset: Dataset, data: bytes) -> FileDataset:
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    head = build_file_meta(dataset.SOPClassUID, dataset.SOPInstanceUID, syntax)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dcmread(io.BytesIO(head + data))
        for _ in found.iterall():
            pass
    return found


def of_script(script: str, **more: Any) -> Dataset:
    """Make an object whose every text is of one script, at every depth."""
    charset, name = NAMES[script]
    item, deep = Dataset(), Dataset()
    deep.PatientComments = name
    item.CodeMeaning = name
    item.RequestedProcedureDescription = name
    item.ReferencedPatientSequence = Sequence([deep])
    return instance(
        SpecificCharacterSet=charset,
        PatientName=name,
        ReferringPhysicianName=name,
        InstitutionName=name,
        StudyDescription=name,
        ProcedureCodeSequence=Sequence([item]),
        rows=4,
        columns=4,
        **more,
    )


@pytest.mark.parametrize("local", NAMES)
@pytest.mark.parametrize("foreign", NAMES)
def test_names_of_every_script_survive(foreign: str, local: str) -> None:
    """The local name is there, the foreign one in the record, all other text what it was."""
    dataset = of_script(foreign)
    name = NAMES[local][1]
    patient = LocalPatient(PatientId("L-1", HERE), Demographics(name, "19700101", "F"))

    found = rewritten(dataset, patient, SETTINGS)

    assert str(found.PatientName) == name
    (kept,) = found.OriginalAttributesSequence[0].ModifiedAttributesSequence
    if local != foreign:
        assert str(kept.PatientName) == NAMES[foreign][1]
    for keyword in ("ReferringPhysicianName", "InstitutionName", "StudyDescription"):
        assert str(found[keyword].value) == NAMES[foreign][1]
    (item,) = found.ProcedureCodeSequence
    assert item.CodeMeaning == NAMES[foreign][1]
    assert item.ReferencedPatientSequence[0].PatientComments == NAMES[foreign][1]


@pytest.mark.parametrize(
    ("foreign", "local", "expected"),
    [
        ("latin", "latin", "ISO_IR 100"),
        ("latin", "ascii", "ISO_IR 100"),
        ("japanese", "japanese", JAPANESE),
        ("chinese", "chinese", "GB18030"),
        ("latin", "cyrillic", "ISO_IR 192"),
        ("ascii", "latin", "ISO_IR 192"),
        ("cyrillic", "japanese", "ISO_IR 192"),
    ],
)
def test_only_what_does_not_fit_changes_the_character_set(
    foreign: str, local: str, expected: Any
) -> None:
    """The object's own stays where it holds the local name; else everything is Unicode."""
    patient = LocalPatient(PatientId("L-1", HERE), Demographics(NAMES[local][1], "", ""))
    found = rewritten(of_script(foreign), patient, SETTINGS)

    assert found.SpecificCharacterSet == expected
    (kept,) = found.OriginalAttributesSequence[0].ModifiedAttributesSequence
    if expected == "ISO_IR 192" and foreign != "ascii":
        # The previous values keep their bytes, and the character set these are in.
        assert kept.SpecificCharacterSet == NAMES[foreign][0]
    else:
        assert "SpecificCharacterSet" not in kept


@pytest.mark.parametrize("declared", [None, ""])
def test_text_without_a_character_set_is_kept_as_it_is_shown(declared: str | None) -> None:
    """Latin-1 that nobody declared is common; in Unicode it says so, in the record too."""
    dataset = of_script("ascii", PatientID="1")
    data = Identifier.from_dataset(dataset)
    data.remove(0x00080005)
    if declared is not None:
        data.put(Element(0x00080005, "CS", b""))
    data.put(Element(0x00100010, "PN", "Müller".encode("latin_1")))
    data.put(Element(0x00080080, "LO", "Süd".encode("latin_1")))
    patient = LocalPatient(PatientId("L-1", HERE), Demographics("Анна", "", ""))

    encoded = data.encode(EXPLICIT_VR_LITTLE_ENDIAN)
    made = Coercer(patient, SETTINGS, None, AT).rewrite(
        lambda at, size: encoded[at : at + size], len(encoded), EXPLICIT_VR_LITTLE_ENDIAN
    )
    found = read(dataset, b"".join(made.chunks()))

    assert found.SpecificCharacterSet == "ISO_IR 192"
    assert (found.PatientName, found.InstitutionName) == ("Анна", "Süd")
    (kept,) = found.OriginalAttributesSequence[0].ModifiedAttributesSequence
    assert kept.PatientName == "Müller"
    assert "SpecificCharacterSet" not in kept


@pytest.mark.parametrize("local", NAMES)
@pytest.mark.parametrize("foreign", NAMES)
def test_answers_are_coerced_in_every_script(foreign: str, local: str) -> None:
    """An answer holds the same names as the object."""
    dataset = of_script(foreign)
    del dataset.PixelData
    name = NAMES[local][1]
    patient = LocalPatient(PatientId("L-1", HERE), Demographics(name, "", ""))

    answer = coerce_answer(Identifier.from_dataset(dataset), patient, SETTINGS, None)

    assert answer.text(0x00100010) == name
    assert answer.text(0x00080080) == NAMES[foreign][1]


# ----------------------------------------------------------------------- taking back


SYNTAXES = (IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN)
ALPHABETS = {
    "ascii": "abcXYZ 09-_.",
    "latin": "abcÄöüßéñ 09",
    "cyrillic": "abcАбвгдЖЯ 09",
    "japanese": "abc山田太郎やまだ 09",
    "chinese": "abc王小东张 09",
    "unicode": "abcÄвЖ山王ő 09",
}


def words(script: str, longest: int = 16) -> st.SearchStrategy[str]:
    return st.text(ALPHABETS[script], max_size=longest).map(lambda text: text.strip())


def names(script: str) -> st.SearchStrategy[str]:
    return st.lists(words(script, 8), min_size=1, max_size=3).map(
        lambda parts: "^".join(part or "x" for part in parts)
    )


def coded(text: st.SearchStrategy[str]) -> st.SearchStrategy[Dataset]:
    def made(value: str, meaning: str) -> Dataset:
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "99N", meaning
        return code

    return st.builds(made, st.sampled_from(["1", "2", "3"]), text)


def holding(script: str) -> list[Any]:
    """Return character sets that hold a script, one of which may be that of an item alone."""
    return [NAMES[script][0] or "ISO_IR 100", "ISO_IR 192"]


@st.composite
def objects(draw: st.DrawFn) -> Dataset:
    """Draw an object of one script, with or without each of the elements that are coerced."""
    script = draw(st.sampled_from(sorted(NAMES)))
    text, word = words(script), st.text("ABC019", min_size=1, max_size=12)
    elements: dict[str, Any] = {"SpecificCharacterSet": NAMES[script][0]}

    def perhaps(keyword: str, values: st.SearchStrategy[Any]) -> None:
        elements[keyword] = draw(st.none() | st.just("") | values)

    perhaps("PatientName", names(script))
    perhaps("PatientID", text)
    perhaps("IssuerOfPatientID", text)
    perhaps("TypeOfPatientID", st.sampled_from(["TEXT", "RFID"]))
    perhaps("PatientBirthDate", st.sampled_from(["19700101", "20200229"]))
    perhaps("PatientSex", st.sampled_from("MFO"))
    perhaps("OtherPatientIDs", word)
    perhaps("AccessionNumber", word)
    perhaps("StudyID", word)
    perhaps("StudyDescription", text | st.just("CT"))
    perhaps("PatientComments", text | st.just("a\\b"))
    perhaps("InstitutionName", text)
    perhaps("InstanceCoercionDateTime", st.just("20200101"))
    perhaps("PlacerOrderNumberImagingServiceRequest", word)

    def items(keyword: str, **kinds: st.SearchStrategy[Any]) -> None:
        drawn = draw(st.none() | st.lists(st.fixed_dictionaries({}, optional=kinds), max_size=2))
        if drawn is None:
            return
        made = []
        for values in drawn:
            item = Dataset()
            if draw(st.integers(0, 3)) == 0:
                item.SpecificCharacterSet = draw(st.sampled_from(holding(script)))
            for name, value in values.items():
                setattr(item, name, value)
            made.append(item)
        elements[keyword] = Sequence(made)

    codes = st.lists(coded(text), min_size=1, max_size=2).map(Sequence)
    items("OtherPatientIDsSequence", PatientID=text, IssuerOfPatientID=text)
    items("IssuerOfPatientIDQualifiersSequence", UniversalEntityID=word)
    items("ProcedureCodeSequence", CodeValue=st.sampled_from(["1", "2"]), CodeMeaning=text)
    items(
        "RequestAttributesSequence",
        AccessionNumber=word,
        RequestedProcedureID=word,
        RequestedProcedureDescription=text | st.just("CT"),
        RequestedProcedureCodeSequence=codes,
    )
    items(
        "ReferencedRequestSequence",
        AccessionNumber=word,
        FillerOrderNumberImagingServiceRequest=word,
    )
    items("IssuerOfAccessionNumberSequence", LocalNamespaceEntityID=text)
    items("OriginalAttributesSequence", ModifyingSystem=text)
    items("MACParametersSequence", MACAlgorithm=st.just("SHA256"))
    items("ContributingEquipmentSequence", Manufacturer=text)
    items("ContentSequence", TextValue=text, ConceptCodeSequence=codes)
    dataset = instance(rows=2, columns=2, **elements)
    dataset.file_meta.TransferSyntaxUID = UID(draw(st.sampled_from(SYNTAXES)))
    return dataset


@st.composite
def coercions(draw: st.DrawFn) -> tuple[LocalPatient, CoercionSettings, Any]:
    """Draw a local patient of any script, a source's settings and a policy of accessions."""
    script = draw(st.sampled_from(sorted(NAMES)))
    demographics = draw(
        st.none()
        | st.builds(
            Demographics,
            st.just("") | names(script),
            st.sampled_from(["", "19991231"]),
            st.sampled_from(["", "M", "F"]),
        )
    )
    domain = draw(st.sampled_from([HERE, Domain(), Domain("HERE"), Domain("", "1.2", "ISO")]))
    patient = LocalPatient(PatientId(draw(words(script)) or "L-1", domain), demographics)
    rules = draw(
        st.lists(
            st.sampled_from(
                [
                    Rule(Action.SET, 0x00080080, "LO", "Örtlich"),
                    Rule(Action.COPY, 0x00081030, "LO", other=0x00080080),
                    Rule(Action.REMOVE, 0x00081030, "LO"),
                    Rule(Action.PREFIX, 0x00080080, "LO", "N: "),
                    Rule(Action.MAP, 0x00100040, "CS", table={"M": "F"}),
                    Rule(Action.MAP, 0x00080080, "LO", table={"Örtlich": "出"}),
                    Rule(Action.SET, 0x00104000, "LT", "a\\b ж"),
                    Rule(Action.COPY, 0x00080090, "PN", other=0x00100010),
                    Rule(Action.SET, 0x0008103E, "LO", "x", modalities=frozenset({"CT"})),
                ]
            ),
            max_size=3,
        )
    )
    settings = CoercionSettings(
        draw(st.sampled_from(["north", "нord"])),
        "DICOMPROXY",
        draw(st.sampled_from([Domain("NORTH"), Domain()])),
        study_description_prefix=draw(st.sampled_from(["", "[EXT] ", "[é] "])),
        descriptions={"CT": draw(st.sampled_from(["Thorax", "Brust ö", "胸"]))},
        procedure_codes={("1", "99N"): Code("9", "99HERE", draw(st.sampled_from(["a", "ж"])))},
        rules=tuple(rules),
        keep_study_id=draw(st.booleans()),
    )
    accessions = draw(st.sampled_from([None, {}, {"A": Shown("X1", HERE)}]))
    return patient, settings, accessions


@given(objects(), coercions())
def test_restoring_gives_every_coerced_value_back(
    dataset: Dataset, coercion: tuple[LocalPatient, CoercionSettings, Any]
) -> None:
    """The record alone takes a coerced object back to what it was, absent equal to empty."""
    original = read(dataset, data_set_bytes(dataset))
    found = rewritten(dataset, *coercion)

    assert texts(restored(found, original)) == texts(original)


@given(objects(), coercions(), coercions())
def test_coercions_are_taken_back_one_after_the_other(
    dataset: Dataset,
    once: tuple[LocalPatient, CoercionSettings, Any],
    again: tuple[LocalPatient, CoercionSettings, Any],
) -> None:
    """An object that came through two proxies has both records, and leads back through both."""
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    data = data_set_bytes(dataset)
    first = coerced(data, syntax, *once)
    second = read(dataset, coerced(first, syntax, *again))

    back = restored(second, read(dataset, first))
    assert texts(back) == texts(read(dataset, first))
    original = read(dataset, data)
    assert texts(restored(back, original)) == texts(original)


@given(objects(), coercions())
def test_answers_and_objects_never_differ(
    dataset: Dataset, coercion: tuple[LocalPatient, CoercionSettings, Any]
) -> None:
    """Of every key, an answer shows what the delivered object has, absent equal to empty."""
    found = rewritten(dataset, *coercion)
    row = Identifier.from_dataset(dataset)
    answer = coerce_answer(row, *coercion).to_dataset()

    # What only an object has: the record and when it was made, who made it, and signatures.
    for tag in (0x00080015, 0x0018A001, 0x04000561, 0x4FFE0001):
        for one in (found, answer):
            if tag in one:
                del one[tag]
    assert texts(answer) == [pair for pair in texts(found) if pair[0] in row]


def restored(dataset: FileDataset, original: FileDataset) -> FileDataset:
    """Undo the last coercion, by what it has recorded and nothing else."""
    records = dataset.get("OriginalAttributesSequence") or Sequence([])
    if len(records) == len(original.get("OriginalAttributesSequence") or ()):
        return dataset  # nothing was changed
    (previous,) = records[-1].ModifiedAttributesSequence
    for element in previous:
        dataset[element.tag] = element
    dataset.OriginalAttributesSequence = Sequence(records[:-1])
    return dataset


def texts(dataset: Dataset) -> list[Any]:
    """Return all that has a value, in Unicode, at every depth."""
    found: list[Any] = []
    for element in dataset:
        if element.tag == 0x00080005 or element.is_empty:
            continue
        if element.VR == "SQ":
            found.append((int(element.tag), [texts(item) for item in element.value]))
        else:
            found.append((int(element.tag), str(element.value)))
    return found
